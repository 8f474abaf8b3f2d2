"""Claims about knockouts: as the paper measures them, and per mistaken patch; and what is known to be true."""

import json
from pathlib import Path

import numpy as np
import probe_runs
import pytest
from knockouts import CLASSES, CONDITIONS, N, simulate, write_knockout
from report_parts import CURVE, claims_of

from probes.runs.read import ProbeRun

ANCHORS = (-0.4, 0.4)
NONE = (0.0, 0.0)  # what hiding the wrong and the correct class does to the share left wrong
KNOCKOUTS = ("knockout_incorrect", "knockout_correct", "knockout_specificity")


@pytest.fixture
def write(tmp_path):
    """Write a run by name, with a knockout unless `effects` is None; still_wrong can differ from other outcomes."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES}))

    def write(
        name,
        effects,
        number,
        *,
        solved=False,
        still_wrong=None,
        classes=CLASSES,
        **metrics,
    ) -> str:
        options = {
            "root": root,
            "seed": number,
            "images": N,
            "metrics": metrics,
        }
        write = probe_runs.write_solved if solved else probe_runs.write_run
        run = ProbeRun(write(tmp_path / name, [CURVE] * 3 if solved else CURVE, **options))
        if effects is None:
            return str(run.path)

        def of(pair):
            return simulate(np.random.default_rng(number), dict.fromkeys(classes, pair), CONDITIONS)

        tensors = of(effects)
        other = of(still_wrong or effects)
        write_knockout(run, tensors | {key: x for key, x in other.items() if "still_wrong:" in key})
        return str(run.path)

    return write


@pytest.fixture
def draws(write):
    """Return a function that writes random LLMs with these effects, then permuted ones."""
    return lambda *effects: [
        write(
            f"{match}{i}",
            x,
            20 + i,
            untrained=["llm"],
            match=match,
            solved=True,
            draw=i,
        )
        for match in ("update", "permuted")
        for i, x in enumerate(effects)
    ]


@pytest.mark.parametrize(
    ("trained", "still_wrong", "random", "conclusion"),
    [
        (ANCHORS, ANCHORS, NONE, "supported"),
        (ANCHORS, NONE, NONE, "artefact of the instrument"),  # new mistakes elsewhere
    ],
)
def test_conclusions(
    trained,
    still_wrong,
    random,
    conclusion,
    write,
    draws,
):
    runs = [
        write("sgd", trained, 1),
        write(
            "solved",
            trained,
            2,
            solved=True,
            still_wrong=still_wrong,
        ),
    ]
    claims = claims_of([*runs, *draws(random, random, random)])
    assert {claims[name]["conclusion"] for name in KNOCKOUTS} == {conclusion}


def test_one_class_of_a_pair_is_untested_and_says_what_to_block(write, draws):
    paths = [
        write("sgd", ANCHORS, 1, classes=["sky"]),
        write(
            "solved",
            ANCHORS,
            2,
            solved=True,
            classes=["sky"],
        ),
    ]
    claim = claims_of([*paths, *draws(NONE, NONE)])["knockout_correct"]
    paper, optimum, beyond = claim["verdicts"].values()
    assert paper["verdict"] == "holds"
    assert optimum["verdict"] == beyond["verdict"] == "untested"
    assert claim["supported"] is None
    assert claim["conclusion"] == "untested"
    assert "both classes of a pair" in claim["reason"]


def test_random_probes_that_have_not_converged_are_no_control(write, draws):
    """A control below its optimum would make the trained model look better than random ones."""
    runs = [write("solved", ANCHORS, 2, solved=True), *draws(NONE, NONE)]
    path = ProbeRun(runs[1]).path / "metrics.json"
    metrics = json.loads(path.read_text())
    for entry in metrics["path"]["optimum"]["sites"]:
        entry["certificates"][entry["strengths"].index(entry["chosen"])]["converged"] = False
    path.write_text(json.dumps(metrics))
    for claim in claims_of(runs).values():
        if claim["claim"] != "adapter_drop":
            beyond = claim["verdicts"]["beyond_random"]
            assert beyond["verdict"] == claim["conclusion"] == "untested"
            assert claim["supported"] is None
            assert f"probes of {runs[1]} have not converged" in beyond["reason"]
            assert beyond["value"] is not None


def test_what_was_planted_is_known_from_the_checkpoint_before_the_data(write, tmp_path):
    """What neither knows has no truth."""
    run = write("solved", None, 2, solved=True)
    assert not any("truth" in claim for claim in claims_of([run]).values())
    of_data = {
        "adapter_drop": "absent",
        "recovery": "absent",
        "depth": "planted",
    }
    (tmp_path / "data/truth.json").write_text(json.dumps(of_data))
    manifest = Path(run) / "manifest.json"
    truth = {"data": {"recovery": "planted"}, "other_data": {"adapter_drop": "planted"}}
    of_model = {"mllm_training": {"truth": truth}}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | of_model))
    found = {name: claim["truth"] for name, claim in claims_of([run]).items() if "truth" in claim}
    assert found == {"adapter_drop": "absent", "recovery": "planted"}


def test_a_knockout_of_other_layers_is_not_compared_with(write, draws):
    trained = write("trained", ANCHORS, 0, solved=True)
    random = draws(NONE, NONE)
    assert claims_of([trained, *random])["knockout_correct"]["conclusion"] == "supported"
    file = Path(random[1]) / "knockout.json"
    results = json.loads(file.read_text())
    results["options"]["layers"] = [1]
    file.write_text(json.dumps(results))
    claims = claims_of([trained, *random])
    for name in KNOCKOUTS:
        assert claims[name]["conclusion"] == "untested"
        assert "have knockouts with other layers: run `probes knockout`" in claims[name]["reason"]
