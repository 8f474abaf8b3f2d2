"""Activation patching: against full forwards patched by hand, statistics against numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file

from probes.analyses.patching import PatchingOptions
from probes.analyses.patching.patch import (
    Experiment,
    nan_mean,
    object_tokens,
    other_images,
    patching_effects,
)
from probes.analyses.routes.cuts import random_patches
from probes.cli import main

READ_OUT = "layer_02"


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def patched(request, runs, tmp_path_factory):
    """A run and patching.safetensors."""
    out = tmp_path_factory.mktemp("patching")
    words = f"--site {READ_OUT} --draws 2 --batch-size 4 --out {out}".split()
    main(["patching", "--probes", str(runs[request.param].path), *words])
    return runs[request.param], load_file(out / "patching.safetensors")


@torch.no_grad()
def forward_by_hand(mllm, pixels, layer: int = 0, tokens=None, new=None) -> list[torch.Tensor]:
    """Return the image's states at the adapter and after each layer, f[T, d], by an attention written out.

    Those of `tokens` bool[T] at a layer are replaced by `new` f[T, d].
    """
    first = mllm.prefix_ids.shape[1]
    masks = reference.masks_by_layer(mllm, mllm.ids.shape[1], lambda *_: False)
    prefix = mllm.decoder.embed_tokens(mllm.prefix_ids)
    states = [torch.cat([prefix, mllm.states(pixels, ["adapter"])["adapter"]], 1)]
    for number, mask in enumerate(masks):
        if tokens is not None and number == layer:
            states[-1][0, first:][tokens] = new[tokens]
        one = SimpleNamespace(layers=[mllm.decoder.layers[number]], config=mllm.decoder.config)
        states += reference.llama_states(
            one, inputs=states[-1], masks=[mask], positions=torch.arange(mask.shape[-1])
        )
    return [x[0, first:] for x in states]


def test_changes_equal_full_forwards_that_are_patched_by_hand(patched):
    """Image by image and layer by layer, with the mask written out."""
    run, tensors = patched
    mllm = run.mllm()
    probe = run.probes()[READ_OUT]
    dataset = run.dataset()
    others = other_images(len(dataset), seed=0)

    def odds(states, truth):
        p = probe(states[2][None].float())[0].softmax(-1)
        p = p[torch.arange(len(truth)), truth.clamp(min=0)]
        return (p / (1 - p)).log()

    def close(found, expected):
        tolerances = {"rtol": 2e-3, "atol": 2e-4}
        torch.testing.assert_close(found, expected, equal_nan=True, **tolerances)

    for i in (0, 5, 8):
        pixels, of_other = (mllm.preprocess([dataset[n]["image"]]) for n in (i, others[i]))
        truth = mllm.geometry.patches(dataset[i]["target"]).flatten()
        labelled = truth >= 0
        tokens = object_tokens(truth[None])[0]
        assert len(truth[tokens].unique()) == 1
        assert tokens.sum() == truth[labelled].bincount().max()
        donor = forward_by_hand(mllm, of_other)
        own_odds = odds(forward_by_hand(mllm, pixels), truth)
        close(tensors["total"][i], (odds(donor, truth) - own_odds)[labelled].mean())
        for layer in (0, 1):
            states = forward_by_hand(
                mllm, pixels=pixels, layer=layer, tokens=tokens, new=donor[layer]
            )
            change = odds(states, truth) - own_odds
            for group, patches in (("patched", tokens), ("others", ~tokens)):
                expected = change[labelled & patches].mean()  # NaN of no patch, too
                close(tensors[group][i, layer], expected)


class Mixing:
    """A model whose layer adds the mean over tokens; photos and targets are states and labels of tokens already."""

    geometry = SimpleNamespace(patches=lambda target: target)
    preprocess = staticmethod(torch.stack)

    def states(self, pixels, sites, rows=slice(None), hooks=None):
        change = (hooks or {}).get("adapter", lambda states: states)
        states = change(pixels[rows])
        return {"adapter": states, "layer_01": states + states.mean(1, keepdim=True)}


def test_random_tokens_are_read_where_nothing_was_replaced():
    """Against means over the tokens that are labelled, of no object, and not drawn."""
    truth = torch.tensor([0, 0, 0, 1, 1, 1, -1, -1, -1])
    own_odds, other = torch.randn((2, 9, 2), generator=torch.Generator().manual_seed(0))
    options = PatchingOptions(probes="", site="layer_01", layers=(0,), seed=4)
    patch = Experiment(Mixing(), lambda states: states, options).patch
    log_odds = patch({7: {"image": own_odds, "target": truth}}, [other])
    expected = []
    for drawn in random_patches(truth == 0, options.draws, [4, 7]):
        rest = (truth == 1) & ~drawn
        # the mean that a replaced token adds to the log-odds of class 1
        random, patched = ((other - own_odds)[x].sum(0).diff() / 9 for x in (drawn, truth == 0))
        expected.append(torch.cat([random, patched - random]))
        assert rest.any()
    log_odds = torch.cat([log_odds[group][0] for group in ("random", "difference")])
    torch.testing.assert_close(log_odds, torch.stack(expected).mean(0))


def test_each_image_is_given_another_ones_states():
    others = other_images(9, seed=1)
    assert sorted(others) == [*range(9)]
    assert all(other != image for image, other in enumerate(others))
    assert others != other_images(9, seed=2)


def test_means_leave_out_images_without_patches():
    generator = np.random.default_rng(0)
    values = generator.normal(1.0, 2.0, (40, 3))
    values[3:9, 1] = np.nan
    weights = generator.integers(0, 3, (500, 40))
    mean, resampled = nan_mean(torch.tensor(values), torch.tensor(weights))
    np.testing.assert_allclose(mean, np.nanmean(values, 0))
    drawn = np.repeat(values[:, 1], weights[99])
    np.testing.assert_allclose(resampled[99, 1], np.nanmean(drawn))
    tensors = {name: torch.tensor(values) for name in ("patched", "others")}
    tensors |= dict.fromkeys(("random", "difference"), torch.full((40, 3), torch.nan))
    tensors["total"] = torch.tensor(values[:, 0])
    effects = patching_effects(tensors, PatchingOptions(probes="run", layers=(0, 1, 2)))
    assert set(effects) == {"images", "total", "patched", "others"}
    assert [place["value"] for place in effects["others"]] == pytest.approx(mean.tolist())
