"""Activation patching: against full forwards patched by hand, statistics against numpy, bad input."""

import json

import numpy as np
import probe_runs
import pytest
import torch
from safetensors.torch import load_file

from probes.analyses.patching import PatchingOptions
from probes.analyses.patching.patch import (
    nan_mean,
    object_tokens,
    other_images,
    patching_effects,
)
from probes.cli import main

READ_OUT = "layer_02"


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def patched(request, runs, tmp_path_factory):
    """A run and patching.safetensors."""
    out = tmp_path_factory.mktemp("patching")
    words = f"--site {READ_OUT} --draws 2 --batch-size 4 --out {out}".split()
    main(["patching", "--probes", str(runs[request.param].path), *words])
    return runs[request.param], load_file(out / "patching.safetensors")


def forward_by_hand(
    mllm,
    pixels,
    mask: str,
    layer: int = 0,
    tokens=None,
    new=None,
) -> list[torch.Tensor]:
    """Return the input of the LLM and the output of each layer, f[N, d], of a full forward of one image.

    The outputs of `tokens` bool[N] at a layer are replaced by `new` f[N, d]. The mask is written out.
    """
    ids = mllm.ids
    image = mllm.is_image
    states = []
    positions = torch.arange(ids.shape[1])
    allowed = positions[None] <= positions[:, None]
    if mask == "bidirectional":
        allowed = allowed | (image[:, None] & image[None])

    def put(value):
        value = (
            value
            if tokens is None or len(states) != layer
            else torch.where(tokens[:, None], new, value[0])[None]
        )
        states.append(value[0].clone())
        return value

    def before(_, args, kwargs):
        kwargs = kwargs | {"attention_mask": allowed[None, None]}
        if args:
            return (put(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": put(kwargs["hidden_states"])}

    layers = mllm.decoder.layers
    handles = []

    def masked(_, args, kwargs):
        return (args, kwargs | {"attention_mask": allowed[None, None]})

    handles.append(layers[0].register_forward_pre_hook(before, with_kwargs=True))
    handles += [each.register_forward_pre_hook(masked, with_kwargs=True) for each in layers[1:]]

    def after(_, args, out):
        return put(out) if torch.is_tensor(out) else (put(out[0]), *out[1:])

    handles += [each.register_forward_hook(after) for each in layers]
    with torch.no_grad():
        mllm.model.model(
            input_ids=ids,
            pixel_values=pixels,
            use_cache=False,
        )
    for handle in handles:
        handle.remove()
    return states


def test_changes_equal_full_forwards_that_are_patched_by_hand(patched):
    """Image by image and layer by layer, with the mask written out."""
    run, tensors = patched
    mllm = run.mllm()
    probe = run.probes()[READ_OUT]
    mask = run.metrics["image_attention"]
    dataset = run.dataset()
    others = other_images(len(dataset), seed=0)

    def odds(states, truth):
        p = probe(states[mllm.is_image][None].float())[0].softmax(-1)
        p = p[torch.arange(len(truth)), truth.clamp(min=0)]
        return (p / (1 - p)).log()

    def close(found, expected):
        torch.testing.assert_close(
            found,
            expected,
            rtol=2e-3,
            atol=2e-4,
            equal_nan=True,
        )

    for i in (0, 5, 8):
        pixels, of_other = (mllm.preprocess([dataset[n]["image"]]) for n in (i, others[i]))
        truth = mllm.geometry.patches(dataset[i]["target"]).flatten()
        labelled = truth >= 0
        tokens = object_tokens(truth[None])[0]
        assert len(truth[tokens].unique()) == 1
        assert tokens.sum() == truth[labelled].bincount().max()
        donor = forward_by_hand(mllm, of_other, mask)
        own = odds(forward_by_hand(mllm, pixels, mask)[2], truth)
        close(tensors["total"][i], (odds(donor[2], truth) - own)[labelled].mean())
        where = torch.zeros_like(mllm.is_image)
        where[mllm.is_image.nonzero().flatten()[tokens]] = True
        for layer in (0, 1):
            states = forward_by_hand(
                mllm,
                pixels,
                mask,
                layer,
                where,
                donor[layer],
            )
            change = odds(states[2], truth) - own
            for group, patches in (("patched", tokens), ("others", ~tokens)):
                expected = change[labelled & patches].mean()  # NaN of no patch, too
                close(tensors[group][i, layer], expected)


def test_each_image_is_given_another_ones_states():
    others = other_images(9, seed=1)
    assert sorted(others) == [*range(9)]
    assert all(other != image for image, other in enumerate(others))
    assert others != other_images(9, seed=2)


def test_layers_are_all_before_the_read_out_also_those_without_probes(checkpoints, runs, tmp_path):
    root = runs["causal"].manifest["data"]["root"]
    run = probe_runs.fit(
        checkpoints["causal"],
        root,
        tmp_path,
        "--model.sites",
        "[adapter,layer_02,final_norm]",
    )
    for site, layers in (("layer_02", [0, 1]), ("final_norm", [0, 1, 2, 3])):
        out = tmp_path / site
        main(
            [
                "patching",
                "--probes",
                str(run.path),
                "--site",
                site,
                "--limit",
                "2",
                "--out",
                str(out),
            ]
        )
        assert json.loads((out / "patching.json").read_text())["layers"] == layers


def test_means_leave_out_images_without_patches_and_intervals_hold_together():
    generator = np.random.default_rng(0)
    values = generator.normal(1.0, 2.0, (40, 3))
    values[3:9, 1] = np.nan
    weights = generator.integers(0, 3, (500, 40)).astype(float)
    mean, resampled = nan_mean(torch.tensor(values), torch.tensor(weights))
    np.testing.assert_allclose(mean, np.nanmean(values, 0))
    for r in (0, 99):
        rows = [
            values[i, 1]
            for i in range(40)
            if not np.isnan(values[i, 1])
            for _ in range(int(weights[r, i]))
        ]
        np.testing.assert_allclose(resampled[r, 1], np.mean(rows))
    held = 0
    draws = 200
    options = PatchingOptions(probes="run", layers=tuple(range(6)))
    for _ in range(draws):
        values = torch.tensor(generator.normal(0.0, 1.0, (60, 6)))
        tensors = {"total": values[:, 0], "patched": values, "others": values}
        tensors |= dict.fromkeys(("random", "difference"), torch.full_like(values, torch.nan))
        effects = patching_effects(tensors, options)
        assert set(effects) == {"images", "total", "patched", "others"}
        held += all(place["ci95"][0] <= 0 <= place["ci95"][1] for place in effects["patched"])
    assert 0.88 <= held / draws <= 0.99, "all six intervals hold together in about 95% of the draws"
