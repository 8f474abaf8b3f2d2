"""The three columns of a claim: no verdict without convergence and controls; intervals cover images and draws."""

import probe_runs
import pytest
import tiny_models
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.claims import evaluate_claims
from probes.report.effects import drop_and_recovery
from probes.report.figures.claims import claim_values
from probes.report.study import read_studies
from probes.report.verdicts import Effect, compare_to_draws, judge, path_column, unconverged
from probes.results.probe_run import ProbeRun

TRAINED = [0.5, 0.4, 0.5, 0.6, 0.7, 0.7]  # accuracies at encoder, adapter, layers, final norm
STUDIES = 500


@pytest.fixture
def write(tmp_path):
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 1)
    return lambda name, quality, seed, **metrics: str(
        probe_runs.write_run(tmp_path / name, quality, root=root, seed=seed, metrics=metrics)
    )


def test_judge():
    assert [judge(1, x) for x in ([0.1, 0.2], [-0.1, 0.2], [-0.2, -0.1])] == ["holds", "does not hold", "reversed"]
    assert [judge(-1, x) for x in ([0.1, 0.2], [-0.1, 0.2], [-0.2, -0.1])] == ["reversed", "does not hold", "holds"]
    assert judge(1, [0.0, 0.2]) == "does not hold", "zero is not on the claimed side"


def row(strength, low, high, converged=True):
    return {"row": strength, "value": (low + high) / 2, "low": low, "high": high, "converged": converged}


def test_the_path_is_judged_where_the_claim_fares_worst():
    rows = [row(1e-6, -0.01, 0.02), row(1e-4, 0.01, 0.03), row(1e-2, 0.04, 0.06)]
    entry = path_column(1, rows)
    assert (entry["verdict"], entry["row"], entry["ci95"]) == ("does not hold", 1e-6, [-0.01, 0.02])
    assert path_column(1, rows[1:])["verdict"] == "holds" and path_column(1, rows[1:])["row"] == 1e-4
    assert path_column(-1, rows[1:])["verdict"] == "reversed" and path_column(-1, rows[1:])["row"] == 1e-4
    assert path_column(1, [row(1e-6, -0.02, -0.01), rows[2]])["verdict"] == "does not hold", (
        "holds at some, turns at some"
    )
    unsolved = [row(1e-6, -0.02, -0.01, converged=False), rows[2]]
    assert path_column(1, unsolved)["verdict"] == "holds", "what has not converged says nothing"
    counted = path_column(1, unsolved)
    assert (counted["converged"], counted["strengths"]) == (1, 2), "but the column says how many strengths count"
    assert path_column(1, unsolved[:1])["verdict"] == "not converged"


def beyond_draws(trained, draws):
    entry = compare_to_draws(1, trained, draws)
    return entry["value"], entry["ci95"]


def simulated(truth, spread, draws, images, generator):
    """A trained model's estimate and those of random draws: means over images whose difficulty they share."""
    shared = torch.randn(images, generator=generator)
    weights = bootstrap_weights(images, 400, seed=int(torch.randint(1 << 30, (1,), generator=generator)))
    means = [truth, *(spread * torch.randn(draws, generator=generator)).tolist()]
    samples = [mean + 0.5 * shared + 0.3 * torch.randn(images, generator=generator) for mean in means]
    one = lambda x: Effect({"": (x.mean().item(), weights @ x / weights.sum(1))}, {"images": images})
    effects = [one(x) for x in samples]
    return effects[0], effects[1:]


@pytest.mark.parametrize(("spread", "draws"), [(0.0, 3), (0.05, 2), (0.05, 4), (0.3, 2), (0.3, 5)])
def test_interval_over_images_and_draws_covers_the_truth(spread, draws):
    generator, truth, covered = torch.Generator().manual_seed(draws), 0.1, 0
    for _ in range(STUDIES):
        _, (low, high) = beyond_draws(*simulated(truth, spread, draws, 50, generator))
        covered += low <= truth <= high
    assert covered >= 0.93 * STUDIES, f"{covered} of {STUDIES}; 95% are expected, 93% are two standard errors below"


def test_a_model_like_any_random_draw_holds_in_at_most_five_percent():
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(STUDIES):
        trained, draws = simulated(0.0, 0.05, 3, 50, generator)
        held += judge(1, beyond_draws(trained, draws)[1]) == "holds"
    assert held <= 0.05 * STUDIES


def test_the_bootstrap_alone_would_miss_the_draws():
    """The reason for the wider interval: a bootstrap over images covers far less than 95% if draws differ."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(STUDIES):
        trained, draws = simulated(0.0, 0.3, 2, 50, generator)
        difference = trained.estimate[1] - torch.stack([draw.estimate[1] for draw in draws]).mean(0)
        low, high = difference.quantile(torch.tensor([0.025, 0.975])).tolist()
        covered += low <= 0 <= high
    assert covered < 0.7 * STUDIES


def test_probes_far_from_their_optimum_give_no_verdict(write):
    near, far = write("near", TRAINED, 1), write("far", [x - 0.1 for x in TRAINED], 1)
    best = ProbeRun(write("best", TRAINED, 1))
    assert unconverged(ProbeRun(near), best, "recovery") is None
    assert "points of mIoU below the optimum at" in unconverged(ProbeRun(far), best, "recovery")
    assert "steps; the paper has 6,320" in unconverged(ProbeRun(far), best, "adapter_drop")
    assert "distance from the optimum unknown at encoder: run `probes solve`" in unconverged(
        ProbeRun(near), None, "adapter_drop"
    )


def test_probes_below_the_constant_prediction_give_no_verdict(write):
    run = ProbeRun(write("run", TRAINED, 1, baseline={"class": "wall", "miou": 0.99, "pacc": 0.99}))
    assert "at encoder not better than the constant prediction (99.0% mIoU)" in unconverged(run, run, "adapter_drop")


def cross_validated_recovery(run):
    return drop_and_recovery(run.sites, run.counts, run.weights)["recovery"][0]


def test_figure_of_claims_has_a_diamond_for_each_draw_and_the_trained_model(write, tmp_path):
    draws = [write(f"r{i}", TRAINED, 30 + i, untrained=["llm"], match="update", draw=i) for i in (0, 1)]
    claims = evaluate_claims(read_studies([write("trained", TRAINED, 1), *draws])[0])
    figure, rows = claim_values(claims)
    (recovery,) = [i for i, claim in enumerate(claims) if claim["claim"] == "recovery"]
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "D" and len(line.get_xdata())]
    (line,) = [x for x in diamonds if round(x.get_ydata()[0]) == recovery]
    by_draw = claims[recovery]["verdicts"]["beyond_random"]["by_draw"]
    assert line.get_xdata().tolist() == pytest.approx([100 * x for x in by_draw])
    (line,) = [x for x in figure.axes[0].lines if x.get_marker() == "d" and round(x.get_ydata()[0]) == recovery]
    trained = cross_validated_recovery(ProbeRun(tmp_path / "trained"))
    assert line.get_xdata().tolist() == pytest.approx([100 * trained]), "the trained model by the same probes"
    found = {row["of"]: row["value"] for row in rows if row["claim"] == "recovery"}
    assert found["trained_like_random"] == pytest.approx(trained)
    assert [found["random_0"], found["random_1"]] == by_draw
    assert found["beyond_random"] == claims[recovery]["verdicts"]["beyond_random"]["value"]


def test_a_random_llm_that_recovers_as_much_takes_the_claim_down(write):
    trained = write("trained", TRAINED, 1)
    as_good = [write(f"good{i}", TRAINED, 10 + i, untrained=["llm"], match="update", draw=i) for i in (0, 1)]
    flat = TRAINED[:2] + [0.4] * 4
    worse = [write(f"flat{i}", flat, 20 + i, untrained=["llm"], match="update", draw=i) for i in (0, 1)]
    verdict = lambda paths: {
        claim["claim"]: claim["verdicts"]["beyond_random"] for claim in evaluate_claims(read_studies(paths)[0])
    }["recovery"]
    assert verdict([trained, *worse])["verdict"] == "holds" and verdict([trained, *worse])["draws"] == 2
    assert verdict([trained, *worse])["by_draw"] == [
        pytest.approx(cross_validated_recovery(ProbeRun(path)), abs=1e-9) for path in worse
    ]
    assert verdict([trained, *as_good])["verdict"] == "does not hold"
    assert verdict([trained])["verdict"] == verdict([trained, worse[0]])["verdict"] == "no control"
    assert (
        "draws of a random llm with this analysis: 1; an interval needs two" in verdict([trained, worse[0]])["reason"]
    )
    with pytest.raises(ValueError, match="are the same draw of random weights; pass only one"):
        read_studies([trained, worse[0], as_good[0]])


def test_no_claim_is_supported_without_solved_probes_and_controls(write):
    claims = evaluate_claims(read_studies([write("run", TRAINED, 1)])[0])
    assert claims and not any(claim["supported"] for claim in claims)
    assert {claim["verdicts"]["paper"]["verdict"] for claim in claims} == {"not converged"}
    assert {claim["holds"] for claim in claims} == {True}, "the interval alone, as the contract of results.json says"


def test_classes_that_differ_widen_the_interval_and_missing_ones_are_left_out():
    """Three classes with effects +1, 0, -1 in the trained model and none in two draws: the mean is no effect."""
    generator = torch.Generator().manual_seed(0)
    estimate = lambda value: (value, value + 0.01 * torch.randn(400, generator=generator))
    counts = {"images": 50, "classes": 3}
    trained = Effect({"a": estimate(1.0), "b": estimate(0.0), "c": estimate(-1.0), "d": estimate(5.0)}, counts)
    draws = [Effect({name: estimate(0.0) for name in "abc"}, counts) for _ in range(2)]
    value, (low, high) = beyond_draws(trained, draws)
    assert value == pytest.approx(0, abs=0.01) and high - low == pytest.approx(2 * 4.303 / 3**0.5, rel=0.05)
    found = compare_to_draws(1, trained, draws)
    assert found["value"] == pytest.approx(found["trained"] - sum(found["by_draw"]) / 2), "over the shared classes"
    same = trained._replace(by_unit={name: estimate(1.0) for name in "abc"})
    assert judge(1, beyond_draws(same, draws)[1]) == "holds"
    alike = same._replace(look_alikes={"a": 1, "b": 1, "c": 2})
    assert beyond_draws(alike, draws)[0] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no class has enough cases"):
        beyond_draws(trained, [draws[0]._replace(by_unit={"e": estimate(0.0)})] * 2)
