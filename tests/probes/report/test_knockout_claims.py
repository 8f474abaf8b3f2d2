"""Claims about knockouts: as the paper measures them, and per mistaken patch; and what is known to be true."""

import json
from pathlib import Path

import numpy as np
import pytest
from knockouts import CLASSES, simulate, write_knockout
from report_parts import CURVE, claims_of

from probes.runs.read import ProbeRun

ANCHORS = (-0.4, 0.4)
NONE = (0.0, 0.0)  # what hiding the wrong and the correct class does to the share left wrong
KNOCKOUTS = ("knockout_incorrect", "knockout_correct", "knockout_specificity")


def with_knockout(run: str, effects, number: int, still_wrong=None, classes=CLASSES) -> str:
    """Write a knockout of a run; still_wrong can differ from other outcomes."""

    def of(pair):
        return simulate(np.random.default_rng(number), dict.fromkeys(classes, pair))

    tensors = of(effects)
    other = of(still_wrong or effects)
    tensors |= {key: x for key, x in other.items() if "still_wrong:" in key}
    write_knockout(ProbeRun(run), tensors)
    return run


@pytest.fixture
def solved(write) -> str:
    return write("solved", CURVE, 2, solved=True)


@pytest.fixture
def random(draws) -> list[str]:
    """Random and permuted LLMs without an effect."""
    return [with_knockout(run, NONE, 20 + i) for i, run in enumerate(draws(CURVE, CURVE))]


@pytest.mark.parametrize(
    ("still_wrong", "conclusion"),
    [
        (ANCHORS, "supported"),
        (NONE, "artefact of the instrument"),  # new mistakes elsewhere
    ],
)
def test_conclusions(still_wrong, conclusion, write, solved, random):
    trained = with_knockout(write("sgd", CURVE, 1), ANCHORS, 1)
    claims = claims_of(
        [
            trained,
            with_knockout(solved, effects=ANCHORS, number=2, still_wrong=still_wrong),
            *random,
        ]
    )
    assert {claims[name]["conclusion"] for name in KNOCKOUTS} == {conclusion}


def test_one_class_of_a_pair_is_untested_and_says_what_to_block(write, solved, random):
    runs = [write("sgd", CURVE, 1), solved]
    runs = [with_knockout(run, ANCHORS, 1, classes=["sky"]) for run in runs]
    claim = claims_of([*runs, *random])["knockout_correct"]
    verdicts = [column["verdict"] for column in claim["verdicts"].values()]
    assert verdicts == ["holds", "untested", "untested"]
    assert claim["conclusion"] == "untested"
    assert "both classes of a pair" in claim["reason"]


def test_random_probes_that_have_not_converged_are_no_control(solved, draws):
    """A control below its optimum would make the trained model look better than random ones."""
    sites = ProbeRun(solved).sites
    options = {"unconverged": [("chosen", site) for site in sites]}
    runs = [with_knockout(solved, ANCHORS, 2)]
    runs += [with_knockout(run, NONE, 20) for run in draws(CURVE, CURVE, options=options)]
    for claim in claims_of(runs).values():
        if claim["claim"] != "adapter_drop":
            beyond = claim["verdicts"]["beyond_random"]
            assert beyond["verdict"] == claim["conclusion"] == "untested"
            assert f"probes of {runs[1]} have not converged" in beyond["reason"]
            assert beyond["value"] is not None


def test_what_was_planted_is_known_from_the_checkpoint_before_the_data(solved, tmp_path):
    """What neither knows has no truth."""
    assert not any("truth" in claim for claim in claims_of([solved]).values())
    of_data = {"adapter_drop": "absent", "recovery": "absent", "depth": "planted"}
    root = tmp_path / "data"
    root.mkdir()
    (root / "truth.json").write_text(json.dumps(of_data))
    file = Path(solved) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["data"]["root"] = str(root)
    truth = {"data": {"recovery": "planted"}, "other_data": {"adapter_drop": "planted"}}
    file.write_text(json.dumps(manifest | {"mllm_training": {"truth": truth}}))
    claims = claims_of([solved])
    found = {name: claim["truth"] for name, claim in claims.items() if "truth" in claim}
    assert found == {"adapter_drop": "absent", "recovery": "planted"}


OTHER = {"layers": [1], "block_by": "layer_01", "min_patches": 9, "limit": 9, "classes": ["sky"]}


@pytest.mark.parametrize("option", OTHER)
def test_a_knockout_with_other_options_is_not_compared_with(option, solved, random):
    runs = [with_knockout(solved, ANCHORS, 2), *random]
    file = Path(random[1]) / "knockout.json"
    results = json.loads(file.read_text())
    results["options"][option] = OTHER[option]
    file.write_text(json.dumps(results))
    claims = claims_of(runs)
    for name in KNOCKOUTS:
        assert claims[name]["conclusion"] == "untested"
        assert (
            f"have knockouts with other {option}: run `probes knockout`" in claims[name]["reason"]
        )
