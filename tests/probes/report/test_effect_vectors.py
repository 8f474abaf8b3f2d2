"""Effects as vectors: their files are what the counts say, and an analysis outside the repository adds a claim."""

import json
import math
from dataclasses import replace
from pathlib import Path

import knockouts
import numpy as np
import pandas as pd
import pytest
from extensions import EXAMPLES, forgotten
from report_parts import CURVE, FLAT, studies_of

import probes
from llava_bidir.common.files import write_files
from probes.analyses.claims import read_effects
from probes.cli import main
from probes.report.claims import evaluate_claims
from probes.score.effects import effect_file


@pytest.fixture
def runs(write, draws) -> list[str]:
    """Trained probes, solved ones, and two random LLMs."""
    return [write("sgd", CURVE), write("solved", CURVE, 1, solved=True), *draws(FLAT, FLAT)]


def test_claims_read_effects_and_no_counts(runs, monkeypatch):
    (study,) = studies_of(runs)
    sums_at = probes.ProbeRun.sums_at

    def sums_of_one_site(run, sites):
        """Of how many photos have a class, which no effect says."""
        assert len(sites) == 1, "read"
        return sums_at(run, sites)

    monkeypatch.setattr(probes.ProbeRun, "counts", property(lambda run: pytest.fail("read")))
    monkeypatch.setattr(probes.ProbeRun, "sums_at", sums_of_one_site)
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


def test_an_analysis_outside_the_repository_has_command_section_claim_and_results(runs, tmp_path):
    """The example of README; layer 1 has 10 points more than the adapter, random ones none."""
    own = ["--import", str(EXAMPLES / "analysis.py")]
    with forgotten():
        for run in runs:
            main(["gains", run, *own])
        main(["report", str(tmp_path), "--out", str(tmp_path / "report"), *own])
    scores = probes.ProbeRun(runs[1]).site_scores
    gains = [
        scores[f"layer_0{i}"] - scores[f"layer_0{i - 1}" if i > 1 else "adapter"] for i in (1, 2, 3)
    ]
    results = json.loads((tmp_path / "report/results.json").read_text())
    (claim,) = [claim for claim in results["claims"] if claim["claim"] == "first_gain"]
    assert [column["verdict"] for column in claim["verdicts"].values()] == ["holds"] * 3
    assert claim["conclusion"] == "supported"
    optimum = claim["verdicts"]["optimum"]
    assert [optimum["value"], *optimum["ci95"]] == pytest.approx([gains[0].value, *gains[0].ci95])
    expected = [{"layer": i, "gain": gain.value} for i, gain in enumerate(gains, 1)]
    assert results["masks"]["causal"]["gains"]["gains"] == expected
    table = pd.read_csv(tmp_path / "report/gains_causal.csv").to_dict("records")
    assert table == [pytest.approx(row) for row in expected]
    page = (tmp_path / "report/index.html").read_text()
    section = page[page.index('<section id="gains">') :].partition("</section>")[0]
    assert "<h2>Gains</h2>" in section and "What does each layer add" in section
    assert "<svg" in section and f"<td>{gains[1].value:.4g}</td>" in section
    assert "The first layer adds" in page


@pytest.mark.parametrize(("undefined", "column"), [(0, ""), (1, "optimum"), (2, "beyond_random")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_effect_that_is_no_number_has_no_verdict(undefined, column, value, runs):
    """As of an analysis that found nothing to measure in one of the runs: the report ended in an error."""
    for i, path in enumerate(runs):
        run = probes.ProbeRun(path)
        effect = run.effects["recovery"]
        if i == undefined:
            effect = replace(effect, value=value, resampled=value + effect.resampled)
        probes.write_effects(run, "mine", {"mine": effect})
    with forgotten():
        probes.register_analysis("mine", {"mine": probes.Claim(+1, "Mine: a number")})
        judged = evaluate_claims(*studies_of(runs))
    found = [claim for claim in judged if claim["claim"] == "mine"]
    untested = [
        name
        for claim in found
        for name, x in claim["verdicts"].items()
        if x["verdict"] == "untested"
    ]
    assert bool(found) == bool(column), "no claim without the number that the paper has"
    assert untested[:1] == ([column] if column else [])
