"""Runs that a claim would compare although they differ in layers, data options or prefix, or are equal."""

import json
from pathlib import Path

import pytest
from report_parts import CURVE, FLAT, studies_of

from llava_bidir.common.errors import UserError


def test_controls_at_other_layers_are_refused(write, draws):
    """But random adapters need no layers."""
    few = {"sites": ["adapter", "layer_01"]}
    trained = write("few", CURVE[1:3], solved=True, options=few)
    with pytest.raises(UserError, match=r"in layers, \['layer_01'\] and .*3'\]; .*--model.sites"):
        studies_of([trained, *draws(FLAT, FLAT)])
    assert studies_of([trained, *draws(FLAT[1:3], FLAT[1:3], first=40, options=few)])
    options = {"sites": ["encoder", "adapter"]}
    adapter = {"untrained": ["adapter"], "draw": 0}
    random = write("a0", FLAT[:2], 7, solved=True, options=options, **adapter)
    assert studies_of([write("all", CURVE, solved=True), random])


@pytest.mark.parametrize(
    ("section", "ours", "theirs"),
    [
        ("config", {"prefix": None}, {"prefix": "USER: "}),
        ("config", {"image_px": 224}, {"image_px": 448}),
        ("data", {"options": {}}, {"options": {"background": "class"}}),
    ],
)
def test_other_prefixes_and_data_options_are_refused(section, ours, theirs, write, draws):
    runs = [write("trained", CURVE, solved=True), *draws(FLAT, matches=["update"])]

    def edit(run: str, values: dict) -> None:
        file = Path(run) / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest[section] |= values
        file.write_text(json.dumps(manifest))

    for run in runs:
        edit(run, ours)
    assert studies_of(runs)
    edit(runs[1], theirs)
    (other,) = theirs.values()
    names = "model.prefix|model.image_px|data.options"
    with pytest.raises(UserError, match=f"differ in ({names}), .*{other}"):
        studies_of(runs)


def test_equal_weights_are_no_draws_or_seeds(write, draws):
    """As if all seeds were one: two draws would seem to have no spread at all."""
    trained = write("trained", CURVE, 7, solved=True)
    same = draws(FLAT, FLAT, step=0)
    adapters = []
    seeds = []
    for i in (0, 1):
        adapter = {"untrained": ["adapter"], "draw": i}
        adapters.append(write(f"a{i}", FLAT, 9, solved=True, **adapter))
        seeds.append(write(f"s{i}", CURVE, 7, solved=True, seed=i))
    for runs, expected in (
        ([trained, *same], "same probes at layer_01.*not two draws.*--model.draw"),
        ([trained, *adapters], "same probes at adapter"),
        ([trained, *draws(CURVE, first=7)], "random weights have changed nothing"),
        (seeds, "not two trainings"),
    ):
        with pytest.raises(UserError, match=expected):
            studies_of(runs)
    assert studies_of([trained, *draws(FLAT, FLAT, first=40)])
    assert len(studies_of([seeds[0], write("s2", CURVE, 8, solved=True, seed=2)])) == 2


def test_other_probes_and_other_images_are_refused(write):
    pair = [write("run", CURVE, mask=mask) for mask in ("causal", "bidirectional")]
    probe = json.loads((Path(pair[1]) / "metrics.json").read_text())["probe"]
    options = {"mask": "bidirectional", "probe": probe | {"feature_norm": "batchnorm"}}
    with pytest.raises(UserError, match="differ in feature_norm, 'none' and 'batchnorm'"):
        studies_of([pair[0], write("norm", CURVE, **options)])
    fewer = write("images", CURVE, options={"images": 30})
    with pytest.raises(UserError, match="differ in images or classes"):
        studies_of([*pair, f"another={fewer}"])
