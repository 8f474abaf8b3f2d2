"""What a study concludes about each claim, from its trained, solved and random runs to results.json."""

import json

import numpy as np
import pytest
import scipy.stats
from report_parts import CURVE, FLAT, claims_of, studies_of

from llava_bidir.common.bootstrap import interval
from probes.report.claims import evaluate_claims
from probes.report.page import write_report
from probes.report.verdicts import correct_for_claims
from probes.runs.read import ProbeRun

LOW = [x - 0.25 for x in CURVE]  # trained probes, far below the optimum


def test_trained_probes_are_judged_however_far_from_the_optimum(write):
    """Below the optimum is the effect, not the scores; its interval is paired over images."""
    trained = write("sgd", LOW)
    solved = write("solved", CURVE, 1, solved=True)
    paper = claims_of([trained, solved])["recovery"]["verdicts"]["paper"]
    assert (paper["verdict"], paper["probes"]) == ("holds", "trained")
    ours, best = (ProbeRun(path).effects["recovery"] for path in (trained, solved))
    value = best.value - ours.value
    assert paper["below_optimum"]["value"] == pytest.approx(value)
    paired = interval(value, best.resampled - ours.resampled)
    assert paper["below_optimum"]["ci95"] == pytest.approx(paired)
    assert claims_of([trained])["recovery"]["verdicts"]["paper"]["below_optimum"] is None


@pytest.mark.parametrize(
    ("trained", "solved", "random", "permuted", "conclusion", "about"),
    [
        (CURVE, FLAT, FLAT, FLAT, "artefact of the instrument", None),
        (CURVE, FLAT, None, None, "artefact of the instrument", None),  # no control changes this
        (LOW, CURVE, FLAT, FLAT, "supported", None),
        (None, CURVE, FLAT, FLAT, "supported", None),
        (CURVE, CURVE, FLAT, CURVE, "not learned", "permuted"),
        (None, CURVE, CURVE, FLAT, "not learned", "random"),
        (FLAT, FLAT, FLAT, FLAT, "does not hold", None),
        (FLAT, CURVE, CURVE, CURVE, "does not hold", None),
        (CURVE, None, FLAT, FLAT, "untested", "no solved probes under causal attention"),
        (CURVE, CURVE, None, FLAT, "untested", "draws of random layers: 0, two are needed"),
        (None, CURVE, FLAT, None, "untested", "draws of permuted layers: 0"),
    ],
)
def test_conclusions(trained, solved, random, permuted, conclusion, about, write, draws):
    """A model that has learned nothing can be like one kind of random weights alone, if its own have another scale."""
    runs = [write("sgd", trained)] if trained else []
    runs += [write("solved", solved, 1, solved=True)] if solved else []
    for match, curve in (("update", random), ("permuted", permuted)):
        runs += draws(curve, curve, matches=[match]) if curve else []
    recovery = claims_of(runs)["recovery"]
    assert recovery["conclusion"] == conclusion
    assert recovery["supported"] is {"supported": True, "untested": None}.get(conclusion, False)
    assert ("reason" in recovery) == (conclusion == "untested")
    _, *needed = recovery["verdicts"].values()
    beyond = needed[-1]
    if conclusion == "untested":
        assert about in recovery["reason"]
        assert recovery["p"] is recovery["p_holm"] is None
        assert not solved or beyond["value"] > 0.1, "what was measured is shown"
    elif random:
        assert about in (None, beyond["control"])
        assert set(beyond["controls"]) == {"random", "permuted"}
        least = beyond["controls"][beyond["control"]]
        assert {key: beyond[key] for key in ("value", "ci95", "by_draw")}.items() <= least.items()
        assert beyond["p"] == max(entry["p"] for entry in beyond["controls"].values())
        assert recovery["p"] == max(entry["p"] for entry in needed)


def test_a_verdict_that_does_not_hold_says_what_would_have_been_found(write, draws):
    """With this standard error, 80% of studies of an effect of this size exclude zero and reach the margin."""
    runs = [write("sgd", FLAT, 4), write("solved", FLAT, 1, solved=True), *draws(FLAT, FLAT)]
    verdicts = claims_of(runs)["recovery"]["verdicts"]
    for name, margin in (("paper", 0.0), ("optimum", 0.01), ("beyond_random", 0.01)):
        entry = verdicts[name]
        assert entry["verdict"] == "does not hold"
        half = (entry["ci95"][1] - entry["ci95"][0]) / 2
        estimates = scipy.stats.norm.rvs(
            entry["detectable"], half / 1.96, size=20_000, random_state=0
        )
        assert np.mean((estimates > half) & (estimates >= margin)) == pytest.approx(0.8, abs=0.01)


def test_random_adapters_of_two_masks_are_one_confirmation(write):
    """The same draws cannot be counted twice."""
    runs = []
    for seed, mask in enumerate(("causal", "bidirectional")):
        common = {"mask": mask, "solved": True}
        runs.append(write("solved", CURVE, seed, **common))
        for i in (0, 1):
            adapter = {"untrained": ["adapter"], "draw": i}
            runs.append(write(f"a{i}", FLAT, 30 + i, **adapter, **common))
    claims = evaluate_claims(*studies_of(runs))
    drops = [x["verdicts"]["beyond_random"] for x in claims if x["claim"] == "adapter_drop"]
    assert [drop["df_of_draws"] for drop in drops] == [1, 1]


def test_the_spread_of_draws_is_pooled_over_masks_and_controls(write, draws):
    """Two draws of four kinds: Student's t with four degrees of freedom, never with less spread than the kind's own."""
    runs = []
    spreads = {"causal": (0.004, 0.006), "bidirectional": (0.02, 0.01)}
    for mask, of_controls in spreads.items():
        kind = {"mask": mask, "solved": True}
        runs.append(write("solved", CURVE, 1, **kind))
        for match, spread in zip(("update", "permuted"), of_controls, strict=True):
            curves = [[*FLAT[:4], 0.5 + sign * spread, 0.4] for sign in (-1, 1)]
            runs += draws(*curves, mask=mask, matches=[match])
    claims = evaluate_claims(*studies_of(runs))
    columns = [c["verdicts"]["beyond_random"] for c in claims if c["claim"] == "recovery"]
    beyond = [entry for column in columns for entry in column["controls"].values()]
    assert len(beyond) == 4
    variances = [np.var(entry["by_draw"], ddof=1) for entry in beyond]
    pooled = np.mean(variances)
    assert min(variances) < pooled < max(variances), (
        "one has its own spread, another the pooled one"
    )
    for entry, own in zip(beyond, variances, strict=True):
        assert entry["df_of_draws"] == 4
        half = scipy.stats.t.ppf(0.975, 4) * np.sqrt(max(own, pooled) / 2)
        low, high = (abs(bound - entry["value"]) for bound in entry["ci95_without_draws"])
        expected = [entry["value"] - np.hypot(half, low), entry["value"] + np.hypot(half, high)]
        assert entry["ci95"] == pytest.approx(expected)


def test_claims_are_corrected_for_the_number_of_those_that_were_tested():
    """A claim that the correction undoes is not called supported (Holm 1979)."""
    p = [0.04, None, 0.01, 0.5, 0.025]
    claims = [{"finding": "supported", "p": x} for x in p]
    claims[1]["finding"] = "untested"
    claims[3]["finding"] = "not learned"
    correct_for_claims(claims)
    assert [claim["p_holm"] for claim in claims if claim["p"]] == pytest.approx(
        [0.08, 0.04, 0.5, 0.075]
    )
    assert claims[1]["p_holm"] is None
    for i, finding in ((0, "supported by itself"), (2, "supported"), (3, "not learned")):
        assert claims[i]["finding"] == finding


def test_the_margin_is_that_which_the_study_was_given(write, draws, tmp_path):
    """Of a point, an effect of ten is supported; of twenty nothing is there, and the report says which it was."""
    write("s", CURVE, 1, solved=True)
    draws(FLAT, FLAT)
    study, out = [str(tmp_path)], tmp_path / "report"
    of_a_point = write_report(study, out)
    findings = {}
    for points in (1, 45):
        steps = tmp_path / "steps"
        steps.mkdir(exist_ok=True)
        record = {"step": "report", "kind": "report", "config": {"margin": points}, "inputs": {}}
        record |= {"result": None, "seconds": 0.0}
        (steps / "report.json").write_text(json.dumps(record))
        results = write_report(study, out)
        assert results["margin"] == points / 100
        findings[points] = next(
            claim for claim in results["claims"] if claim["claim"] == "recovery"
        )
    assert findings[1] == next(c for c in of_a_point["claims"] if c["claim"] == "recovery")
    assert (findings[1]["finding"], findings[45]["finding"]) == ("supported", "negligible")
    assert findings[1]["value"] == findings[45]["value"]
    assert write_report(study, out, margin=1)["margin"] == 0.01


def test_a_seed_without_a_verdict_does_not_leave_the_column_without_one(write, draws, tmp_path):
    """Seed 2 has no trained probes and one random LLM only."""
    for seed in (0, 1, 2):
        common = {"seed": seed, "mllm": "models/one"}
        if seed < 2:
            write(f"sgd{seed}", LOW, seed, **common)
        write(f"s{seed}", CURVE, 5 + seed, solved=True, **common)
        draws(*[FLAT] * (2 if seed < 2 else 1), first=30 + 2 * seed, **common)
    (joint,) = write_report([str(tmp_path)], tmp_path / "report")["joint"]
    recovery = next(claim for claim in joint["claims"] if claim["claim"] == "recovery")
    assert recovery["conclusion"] == "supported"
    assert recovery["n"] == {"seeds": 2, "of": 3}, "two columns have a number of two seeds"
    columns = recovery["verdicts"]
    left_out = {name: list(column.get("left_out", {})) for name, column in columns.items()}
    assert left_out == {"paper": [2], "optimum": [], "beyond_random": [2]}
    by_seed = columns["beyond_random"]["by_seed"]
    assert columns["beyond_random"]["value"] == pytest.approx((by_seed[0] + by_seed[1]) / 2)
    assert by_seed[2] is None
    assert columns["paper"]["below_optimum"]["value"] > 0
    assert recovery["p_holm"] >= recovery["p"] > 0
