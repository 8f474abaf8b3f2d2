"""Inference over classes: against numpy and scipy, and on simulated knockouts whose truth is known."""

import itertools
import json

import numpy as np
import probe_runs
import pytest
import scipy.stats
import torch
from knockouts import CLASSES, CONDITIONS, PARTNERS, L, N, simulate, write_knockout
from probes.analyses.knockout.inference import (
    EFFECTS,
    class_effects,
    class_tests,
    criterion_shifts,
    knockout_inference,
    look_alikes,
    mean_over_classes,
)

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.analyses.knockout.cases import find_cases
from probes.analyses.knockout.config import Plan
from probes.analyses.knockout.effects import outcome_key
from probes.results.probe_run import ProbeRun

pytestmark = pytest.mark.numerics


@pytest.fixture
def run(tmp_path) -> ProbeRun:
    """A run on N images of a grid of 2 x 2 patches, without a model."""
    (tmp_path / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    return ProbeRun(probe_runs.write_run(tmp_path / "run", [0.6, 0.5, 0.6, 0.5], root=tmp_path, images=N))


def test_effects_equal_a_loop_over_cases(run):
    """Also against matched tokens, on every outcome, and under every resampling of images."""
    conditions = (*CONDITIONS, "matched_incorrect", "matched_correct")
    tensors = simulate(np.random.default_rng(0), {name: (0.1, 0.2) for name in CLASSES[:2]}, conditions, cases=25)
    write_knockout(run, tensors)
    for outcome, min_patches in itertools.product(("rate", "still_wrong", "log_odds"), (1, 3)):
        estimates = class_effects(run, min_patches, outcome)
        for name in CLASSES[:2]:
            later = {
                c: tensors[f"{name}/{outcome_key(outcome, c)}"][:, 3:].double().mean(1).numpy() for c in conditions
            }
            by_hand = {"knockout_incorrect": later["incorrect"] - later["none"]}
            by_hand["knockout_correct"] = later["correct"] - later["none"]
            contrast = later["correct"] - later["incorrect"]
            by_hand["knockout_specificity"] = contrast - later["random_correct"] + later["random_incorrect"]
            by_hand["knockout_incorrect_matched"] = later["incorrect"] - later["matched_incorrect"]
            by_hand["knockout_correct_matched"] = later["correct"] - later["matched_correct"]
            by_hand["knockout_specificity_matched"] = contrast - later["matched_correct"] + later["matched_incorrect"]
            chosen = tensors[f"{name}/patches"].numpy() >= min_patches
            images = tensors[f"{name}/image"].numpy()[chosen]
            assert set(estimates) == set(by_hand)
            for effect, values in by_hand.items():
                value, resampled = estimates[effect][name]
                assert value == pytest.approx(values[chosen].mean(), abs=1e-6)
                for row in (0, 7):
                    weights = run.weights[row].numpy()[images]
                    assert resampled[row].item() == pytest.approx(np.average(values[chosen], weights=weights), abs=1e-6)


def test_p_values_are_those_of_all_swaps_and_adjusted_by_holm(run):
    """Each class has 9 images, so that all 2^9 swaps of condition and control can be made."""
    rng = np.random.default_rng(1)
    tensors = simulate(rng, {name: (0.15 * i, 0.1) for i, name in enumerate(CLASSES)}, cases=9)
    write_knockout(run, tensors)
    rows = [row for row in class_tests(run, 1, "rate") if row["effect"] == "knockout_incorrect"]
    assert [row["class"] for row in rows] == CLASSES and rows[0]["images"] == rows[0]["cases"] == 9
    for row in rows:
        name = row["class"]
        effect = (tensors[f"{name}/incorrect"] - tensors[f"{name}/none"])[:, 3:].double().mean(1).numpy()
        swapped = [abs(np.mean(effect * signs)) for signs in itertools.product((1, -1), repeat=9)]
        exact = np.mean(np.array(swapped) >= abs(effect.mean()) - 1e-12)
        assert row["p"] == pytest.approx(exact, abs=4 * np.sqrt(exact / 2000) + 0.001)
        assert row["ci95"][0] < row["value"] < row["ci95"][1]
    smallest = 0.0
    for i, row in enumerate(sorted(rows, key=lambda row: row["p"])):
        smallest = max(smallest, min(1, (len(rows) - i) * row["p"]))
        assert row["p_holm"] == pytest.approx(smallest)
        assert row["verdict"] == ("reversed" if row["p_holm"] < 0.05 else "does not hold"), "claimed: negative"
    assert {row["verdict"] for row in rows} == {"reversed", "does not hold"}


@pytest.mark.parametrize("outcome", ["rate", "still_wrong", "log_odds"])
def test_effects_as_in_the_paper_hold_on_every_outcome_and_opposite_ones_are_reversed(run, outcome):
    effects = {name: (-0.5, 0.5) for name in CLASSES[:4]} | {name: (0.5, -0.5) for name in CLASSES[4:]}
    write_knockout(run, simulate(np.random.default_rng(2), effects))
    for row in class_tests(run, 1, outcome):
        assert row["verdict"] == ("holds" if row["class"] in CLASSES[:4] else "reversed")


def test_interval_over_classes_is_students_t_and_never_shorter_than_over_images():
    """The classes' spread decides where it is large, the images' where it is small; scipy and numpy as references."""
    rng = np.random.default_rng(3)
    values, noise = rng.normal(0.1, 1, 6), rng.normal(0, 0.01, (6, 500))
    estimates = {str(i): (v, torch.tensor(v + e)) for i, (v, e) in enumerate(zip(values, noise, strict=True))}
    mean = mean_over_classes(estimates)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean["ci95"] == pytest.approx([expected.low, expected.high]) and mean["value"] == pytest.approx(
        values.mean()
    )
    assert (mean["classes"], mean["units"], mean["sd"]) == (6, 6, pytest.approx(values.std(ddof=1)))
    shared = rng.normal(0, 1, 500)  # images that all classes share: their errors do not cancel in the mean
    mean = mean_over_classes({str(i): (0.1, torch.tensor(0.1 + shared)) for i in range(6)})
    half = scipy.stats.t.ppf(0.975, 5) * shared.std(ddof=1)
    assert mean["ci95"] == pytest.approx([0.1 - half, 0.1 + half])


def test_one_class_says_nothing_about_others():
    one = {"sky": (0.5, torch.full((100,), 0.5))}
    expected = {"value": 0.5, "ci95": None, "classes": 1, "units": 1, "sd": None}
    assert mean_over_classes(one) == expected
    both = mean_over_classes(one | {"ceiling": (0.1, torch.full((100,), 0.1))}, {"sky": "pair", "ceiling": "pair"})
    assert both == expected | {"value": pytest.approx(0.3), "classes": 2}
    assert mean_over_classes({})["value"] is None


def test_resamplings_without_a_class_do_not_count_for_it():
    drawn = torch.tensor([[1.0, 2.0, torch.nan, 4.0], [3.0, 1.0, 2.0, torch.nan]])
    mean = mean_over_classes({"a": (0.0, drawn[0]), "b": (0.0, drawn[1])})
    half = scipy.stats.t.ppf(0.975, 1) * np.std([2, 1.5, 2, 4], ddof=1)
    assert mean["ci95"] == pytest.approx([-half, half])


def hold_rates(draws: int, units: dict[str, str] | None, by_pair: bool, seed: int, shift: float = 0) -> float:
    """Return how often 95% intervals lie above zero; class effects vary about `shift`, with images' noise on top."""
    rng, held = np.random.default_rng(seed), 0
    for _ in range(draws):
        effects = dict(zip(CLASSES, shift + rng.normal(0, 1, 6), strict=True))
        if by_pair:
            effects = {name: effects[min(name, PARTNERS[name])] for name in CLASSES}
        of_images = rng.normal(0, 0.3, (6, 200))
        noisy = {name: value + rng.normal(0, 0.3) for name, value in effects.items()}
        estimates = {n: (v, torch.tensor(v + e)) for (n, v), e in zip(noisy.items(), of_images, strict=True)}
        held += mean_over_classes(estimates, units)["ci95"][0] > 0
    return held / draws


def test_random_effects_hold_by_chance_at_their_nominal_rate():
    """One side of a 95% interval: 2.5% of draws. Where pairs share their effects, only pairs are units."""
    pairs = {name: min(name, PARTNERS[name]) for name in CLASSES}
    assert hold_rates(500, None, by_pair=False, seed=0) <= 0.05
    assert hold_rates(500, pairs, by_pair=True, seed=1) <= 0.05
    assert hold_rates(500, None, by_pair=True, seed=2) > 0.05, "classes are not independent then"
    assert hold_rates(100, None, by_pair=False, seed=3, shift=3) > 0.9


@pytest.mark.slow
def test_knockouts_without_effects_hold_in_at_most_one_of_twenty(run):
    """Of 500 simulated knockouts whose effects of classes vary about zero, each mean effect holds in 5% at most."""
    rng, held = np.random.default_rng(4), dict.fromkeys(EFFECTS, 0)
    run.weights = bootstrap_weights(N, 300)
    for _ in range(500):
        write_knockout(run, simulate(rng, {name: rng.normal(0, 0.1, 2) for name in CLASSES}, cases=20))
        for effect, estimates in class_effects(run).items():
            low, high = mean_over_classes(estimates)["ci95"]
            held[effect] += low > 0 if EFFECTS[effect] > 0 else high < 0
    assert max(held.values()) <= 25, held


def confused_images(
    rng: np.random.Generator, moves: dict[str, np.ndarray | float], drift: float = 0.1
) -> dict[str, torch.Tensor]:
    """Return the knockout of sky and ceiling by signal detection: a patch is called sky where its evidence is positive.

    `moves` shift the evidence for sky if a class is hidden, in all images or by image f[N]; without a knockout it
    drifts with the layer. Each image has patches of both classes.
    """
    sky, ceiling, patches = 0, 1, 12
    truth = torch.tensor([sky, ceiling] * (patches // 2))[None].expand(N, -1)
    evidence = rng.normal(np.where(truth == sky, 0.8, -0.8), 1)
    call = lambda move: torch.tensor(np.where(evidence + np.broadcast_to(move, N)[:, None] > 0, sky, ceiling))
    unmodified, tensors = torch.stack([call(drift * layer) for layer in range(L + 1)]), {}
    for name, other in (("sky", "ceiling"), ("ceiling", "sky")):
        for case in find_cases(unmodified, truth, torch.arange(N), CLASSES.index(name)):
            for key in ("image", "patches", "anchors", "correct_class"):
                tensors.setdefault(f"{name}/{key}", []).append(torch.tensor(getattr(case, key)))
            hidden = {"none": None, "incorrect": name, "correct": other}
            for condition in CONDITIONS:
                read = unmodified[:, case.row].clone()
                if hidden.get(condition):
                    read[1:] = call(moves[hidden[condition]])[case.row]
                for outcome, values in case.outcomes(read, torch.zeros(L + 1, patches)).items():
                    tensors.setdefault(f"{name}/{outcome_key(outcome, condition)}", []).append(values)
    return {key: torch.stack(values) for key, values in tensors.items()}


def verdicts_of(run: ProbeRun) -> dict[str, set[str]]:
    """Return the verdicts of both classes by effect."""
    rows = class_tests(run, 1, "rate")
    return {effect: {row["verdict"] for row in rows if row["effect"] == effect} for effect in EFFECTS}


def test_a_criterion_shift_is_called_one(run):
    """Hiding either class favours ceiling, so that one class shows the paper's effects and the other their mirror."""
    write_knockout(run, confused_images(np.random.default_rng(5), {"sky": -1, "ceiling": -0.7}))
    (pair,) = criterion_shifts(run)
    assert (pair["classes"], pair["shift"], pair["towards"]) == (["sky", "ceiling"], True, "ceiling")
    assert all(pair["hide"][name]["ci95"][1] < 0 for name in ("sky", "ceiling")), "the lean is towards sky"
    assert verdicts_of(run)["knockout_incorrect"] == verdicts_of(run)["knockout_correct"] == {"holds", "reversed"}
    assert knockout_inference(run)["criterion_shifts"] == [pair]


def test_anchors_are_no_criterion_shift(run):
    """Hiding sky favours ceiling, and hiding ceiling sky."""
    write_knockout(run, confused_images(np.random.default_rng(6), {"sky": -1, "ceiling": 1}))
    (pair,) = criterion_shifts(run)
    assert not pair["shift"] and pair["towards"] is None
    assert pair["hide"]["sky"]["ci95"][1] < 0 < pair["hide"]["ceiling"]["ci95"][0]
    assert verdicts_of(run)["knockout_incorrect"] == verdicts_of(run)["knockout_correct"] == {"holds"}


@pytest.mark.slow
def test_criterion_shifts_are_rarely_found_where_there_are_none_on_average(run):
    rng, found = np.random.default_rng(7), []
    for _ in range(200):
        moves = {name: rng.normal(0, 0.7, N) for name in ("sky", "ceiling")}
        write_knockout(run, confused_images(rng, moves, drift=0))
        found.append(criterion_shifts(run)[0]["shift"])
    assert np.mean(found) <= 0.05


def test_moves_of_mirror_cases_equal_a_loop_over_patches(run):
    """Cases with ceiling called sky, and sky ceiling, have opposite signs; those without anchors do not count."""
    tensors = confused_images(np.random.default_rng(8), {"sky": -0.6, "ceiling": 0.2})
    tensors["sky/anchors"][:10] = 0
    write_knockout(run, tensors)
    (pair,) = criterion_shifts(run)
    moves = {"sky": [], "ceiling": []}
    for name, other in (("sky", "ceiling"), ("ceiling", "sky")):
        for i in range(len(tensors[f"{name}/image"])):
            for condition, hidden in (("incorrect", name), ("correct", other)):
                lean, base = (tensors[f"{name}/lean:{key}"][i].tolist() for key in (condition, "none"))
                move = (lean[3] + lean[4] - base[3] - base[4]) / 2
                if tensors[f"{name}/anchors"][i] > 0:
                    moves[hidden].append(move if name == "sky" else -move)
    for name, values in moves.items():
        assert pair["hide"][name]["value"] == pytest.approx(np.mean(values), abs=1e-6)


def test_look_alikes_are_the_classes_mostly_mistaken_for_each_other(run):
    tensors = simulate(np.random.default_rng(9), {name: (0, 0) for name in ("sky", "ceiling", "road", "wall")})
    tensors["road/correct_class"][:30] = CLASSES.index("wall")
    write_knockout(run, tensors)
    assert look_alikes(run) == {
        **{name: ("sky", "ceiling") for name in ("sky", "ceiling")},
        **{"road": ("road", "wall"), "wall": ("wall", "building")},
    }


def test_results_of_all_outcomes(run):
    tensors = simulate(np.random.default_rng(10), {name: (-0.4, 0.4) for name in CLASSES})
    few = simulate(np.random.default_rng(11), {"wall": (0, 0)}, cases=5)
    write_knockout(run, tensors | few)
    results = json.loads(json.dumps(knockout_inference(run)))
    assert results["min_patches"] == 1 and results["too_few_images"] == ["wall"]
    assert set(results["outcomes"]) == {"rate", "still_wrong", "log_odds"} and results["criterion_shifts"] is None
    for outcome, of_outcome in results["outcomes"].items():
        for effect in EFFECTS:
            assert of_outcome["mean"][effect]["verdict"] == of_outcome["mean_over_pairs"][effect]["verdict"] == "holds"
            assert of_outcome["mean"][effect] | {"verdict": 0} == (
                mean_over_classes(class_effects(run, 1, outcome)[effect]) | {"verdict": 0}
            )
        assert [of_outcome["mean_over_pairs"]["knockout_correct"][key] for key in ("classes", "units")] == [5, 3]


@pytest.mark.parametrize(("groups", "tested"), [(3, 0), (6, len(CLASSES))])
def test_a_class_in_few_groups_of_images_is_not_tested(groups, tested, run):
    """Swapping three cities can never give p < 0.05, so that "does not hold" would say nothing."""
    cities = torch.arange(N) % groups
    path = probe_runs.write_run(
        run.path.parent / "cities", [0.6, 0.5, 0.6, 0.5], root=run.path.parent, images=N, groups=cities
    )
    run = ProbeRun(path)
    write_knockout(run, simulate(np.random.default_rng(10), {name: (-0.4, 0.4) for name in CLASSES}))
    results = knockout_inference(run)
    assert len({row["class"] for row in results["outcomes"]["rate"]["classes"]}) == tested
    assert results["too_few_images"] == (CLASSES if tested == 0 else [])
    assert results["outcomes"]["rate"]["mean"]["knockout_correct"]["classes"] == len(CLASSES)


def test_files_of_earlier_knockouts_have_the_papers_outcome_only(run):
    tensors = simulate(np.random.default_rng(12), {name: (-0.4, 0.4) for name in CLASSES})
    write_knockout(run, {key: values for key, values in tensors.items() if ":" not in key})
    results = knockout_inference(run)
    assert list(results["outcomes"]) == ["rate"] and results["criterion_shifts"] is None
    assert class_effects(run, outcome="log_odds") == {}
    (run.path / "knockout.json").write_text(json.dumps({"classes": [{"class": "sky"}], "layers": "all"}))
    assert Plan.of_run(run) == Plan(["sky"]), "Eq. 1, which cuts the own key"


def test_a_run_without_a_knockout_has_no_inference(run):
    assert knockout_inference(run) == {} and class_effects(run) == {} and criterion_shifts(run) is None
