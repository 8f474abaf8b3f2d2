"""Runs that a claim would compare although they differ in layers, data options or prefix, or are equal."""

import json
from pathlib import Path

import pytest
from report_parts import CURVE, FLAT, studies_of
from safetensors.torch import load_file, save_file

from llava_bidir.common.errors import UserError


def keep_sites(run: str, kept: list[str]) -> None:
    """Leave a solved run these sites only."""
    path = Path(run)
    metrics = json.loads((path / "metrics.json").read_text())
    indices = [i for i, entry in enumerate(metrics["sites"]) if entry["site"] in kept]
    for entry in (metrics, metrics["path"]["optimum"]):
        entry["sites"] = [entry["sites"][i] for i in indices]
    (path / "metrics.json").write_text(json.dumps(metrics))
    counts = load_file(path / "counts.safetensors")
    for name in ("intersection", "predicted", "patch_right"):
        counts[name] = counts[name][indices].contiguous()
    save_file(counts, path / "counts.safetensors")


def edit_manifest(run: str, section: str, **values) -> None:
    file = Path(run) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest[section] |= values
    file.write_text(json.dumps(manifest))


def test_controls_at_other_layers_are_refused(write, draws):
    trained = write("trained", CURVE, solved=True)
    random = draws(FLAT, FLAT)
    assert studies_of([trained, *random])
    keep_sites(trained, ["adapter", "layer_01"])
    with pytest.raises(UserError, match=r"in layers, \['layer_01'\] and .*3'\]; .*--model.sites"):
        studies_of([trained, *random])
    for run in random:
        keep_sites(run, ["adapter", "layer_01"])
    assert studies_of([trained, *random])


def test_random_adapters_need_no_layers(write):
    trained = write("trained", CURVE, solved=True)
    adapter = write(
        "a0",
        FLAT,
        7,
        solved=True,
        untrained=["adapter"],
        draw=0,
    )
    keep_sites(adapter, ["encoder", "adapter"])
    assert studies_of([trained, adapter])


@pytest.mark.parametrize(
    ("section", "ours", "theirs"),
    [
        ("config", {"prefix": None}, {"prefix": "USER: "}),
        ("config", {"image_px": 224}, {"image_px": 448}),
        ("data", {"options": {}}, {"options": {"background": "class"}}),
    ],
)
def test_other_prefixes_and_data_options_are_refused(
    section,
    ours,
    theirs,
    write,
    draws,
):
    trained = write("trained", CURVE, solved=True)
    (draw,) = draws(FLAT, matches=["update"])
    for run in (trained, draw):
        edit_manifest(run, section, **ours)
    assert studies_of([trained, draw])
    edit_manifest(draw, section, **theirs)
    other = next(iter(theirs.values()))
    names = "model.prefix|model.image_px|data.options"
    with pytest.raises(UserError, match=f"differ in ({names}), .*{other}"):
        studies_of([trained, draw])


def test_equal_weights_are_no_draws_or_seeds(write, draws):
    """As if all seeds were one: two draws would seem to have no spread at all."""
    trained = write("trained", CURVE, 7, solved=True)
    same = draws(FLAT, FLAT, step=0)
    adapters = [
        write(
            f"a{i}",
            FLAT,
            9,
            solved=True,
            untrained=["adapter"],
            draw=i,
        )
        for i in (0, 1)
    ]
    seeds = [
        write(
            f"s{seed}",
            CURVE,
            7,
            solved=True,
            seed=seed,
        )
        for seed in (0, 1)
    ]
    for runs, expected in (
        ([trained, *same], "same probes at layer_01.*not two draws.*--model.draw"),
        ([trained, *adapters], "same probes at adapter"),
        (seeds, "not two trainings"),
    ):
        with pytest.raises(UserError, match=expected):
            studies_of(runs)
    other = write(
        "r2",
        FLAT,
        8,
        solved=True,
        untrained=["llm"],
        match="update",
        draw=2,
    )
    assert studies_of([trained, same[0], other])
    assert (
        len(
            studies_of(
                [
                    seeds[0],
                    write(
                        "s2",
                        CURVE,
                        8,
                        solved=True,
                        seed=2,
                    ),
                ]
            )
        )
        == 2
    )


def test_a_control_equal_to_the_trained_model_is_refused(write, draws):
    trained = write("trained", CURVE, 7, solved=True)
    with pytest.raises(UserError, match="random weights have changed nothing"):
        studies_of([trained, *draws(CURVE, first=7)])


def test_other_probes_and_other_images_are_refused(write):
    pair = [write("run", CURVE, mask=mask) for mask in ("causal", "bidirectional")]
    probe = json.loads((Path(pair[1]) / "metrics.json").read_text())["probe"]
    options = {"mask": "bidirectional", "probe": probe | {"feature_norm": "batchnorm"}}
    with pytest.raises(UserError, match="differ in feature_norm, 'none' and 'batchnorm'"):
        studies_of([pair[0], write("norm", CURVE, **options)])
    with pytest.raises(UserError, match="differ in images or classes"):
        studies_of([*pair, f"another={write('images', CURVE, images=30)}"])
