"""Effects as vectors: their files are what the counts say, and an analysis outside the repository adds a claim."""

import json
import math
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import knockouts
import numpy as np
import pytest
from report_parts import CURVE, FLAT, studies_of

import probes
from llava_bidir.common.files import write_files
from probes.analyses import claims
from probes.analyses.claims import read_effects
from probes.report.claims import evaluate_claims
from probes.score.effects import effect_file

EXAMPLE = Path(__file__).parents[2] / "extending/outside_analysis.py"


@pytest.fixture
def runs(write, draws) -> list[str]:
    """Trained probes, solved ones, and two random LLMs."""
    return [write("sgd", CURVE), write("solved", CURVE, 1, solved=True), *draws(FLAT, FLAT)]


def make_place(claim: str, monkeypatch) -> None:
    """Have a claim of this name forgotten after the test that registers it."""
    for registry in (claims.CLAIMS, claims.ANALYSIS_OF):
        monkeypatch.setitem(registry, claim, None)
        del registry[claim]


def test_claims_read_effects_and_no_counts(runs, monkeypatch):
    (study,) = studies_of(runs)
    for name in ("counts", "sums_at"):
        monkeypatch.setattr(probes.ProbeRun, name, property(lambda run: pytest.fail("read")))
    (found,) = (claim for claim in evaluate_claims(study) if claim["claim"] == "recovery")
    assert found["value"] == probes.ProbeRun(runs[0]).effects["recovery"].value
    monkeypatch.undo()
    (Path(runs[0]) / "effects.safetensors").unlink()
    (study,) = studies_of(runs)
    with pytest.raises(ValueError, match=r"effects.safetensors: "):
        evaluate_claims(study)


def test_effects_of_other_probes_are_refused(runs):
    run = probes.ProbeRun(runs[0])
    tensors = knockouts.simulate(np.random.default_rng(0), {"sky": (-0.4, 0.4)})
    knockouts.write_knockout(run, tensors)
    path = run.path / "knockout_effects.safetensors"
    write_files({path: effect_file({"knockout_correct": run.effects["recovery"]}, "others")})
    with pytest.raises(ValueError, match="made from other probes than .*; run knockout again"):
        read_effects(run)
    path.write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match=r"knockout_effects.safetensors: "):
        read_effects(run)


def test_an_analysis_outside_the_repository_adds_a_claim_with_three_columns(
    runs, tmp_path, monkeypatch
):
    """The example, copied out of the repository; layer 1 has 10 points more than the adapter, random ones none."""
    make_place("first_layer", monkeypatch)
    script = shutil.copy(EXAMPLE, tmp_path / "mine.py")
    monkeypatch.setattr("sys.argv", ["mine.py", str(tmp_path), "--out", str(tmp_path / "report")])
    runpy.run_path(script, run_name="__main__")
    results = json.loads((tmp_path / "report/results.json").read_text())
    (claim,) = [claim for claim in results["claims"] if claim["claim"] == "first_layer"]
    assert [column["verdict"] for column in claim["verdicts"].values()] == ["holds"] * 3
    assert claim["conclusion"] == "supported"
    counts = probes.ProbeRun(runs[0]).counts
    accuracy = counts.intersection.sum((1, 2)).double() / counts.labelled.sum()
    assert claim["value"] == pytest.approx((accuracy[2] - accuracy[1]).item())
    page = (tmp_path / "report/index.html").read_text()
    assert "The first layer improves on the adapter" in page


@pytest.mark.parametrize(("undefined", "column"), [(0, ""), (1, "optimum"), (2, "beyond_random")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_effect_that_is_no_number_has_no_verdict(undefined, column, value, runs, monkeypatch):
    """As of an analysis that found nothing to measure in one of the runs: the report ended in an error."""
    make_place("mine", monkeypatch)
    probes.register_analysis("mine", {"mine": probes.Claim(+1, "Mine: a number")})
    for i, path in enumerate(runs):
        run = probes.ProbeRun(path)
        effect = run.effects["recovery"]
        if i == undefined:
            effect = replace(effect, value=value, resampled=value + effect.resampled)
        probes.write_effects(run, "mine", {"mine": effect})
    found = [claim for claim in evaluate_claims(*studies_of(runs)) if claim["claim"] == "mine"]
    untested = [
        name
        for claim in found
        for name, x in claim["verdicts"].items()
        if x["verdict"] == "untested"
    ]
    assert bool(found) == bool(column), "no claim without the number that the paper has"
    assert untested[:1] == ([column] if column else [])
