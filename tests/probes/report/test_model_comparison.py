"""Comparisons of models on the same photos: planted pairs, their intervals, order and names."""

import json
from pathlib import Path

import probe_runs
import pytest
import torch
from safetensors.torch import load_file, save_file

from probes.cli import main
from probes.report.model_comparison import (
    class_differs,
    compare_runs,
    difference_of_best,
    differs,
    pair_sites,
)
from probes.report.model_tables import describe_comparison
from probes.runs.probe_run import ProbeRun
from probes.runs.study import labels_of_models
from probes.score.estimate import Estimate

QUALITY = [0.50, 0.40, 0.52, 0.60, 0.58, 0.58]  # encoder, adapter, three layers, final norm
WORSE = [*QUALITY[:3], 0.50, 0.48, 0.48]


@pytest.fixture
def report(tmp_path, capsys):
    """Write a report of runs, and return results.json and what was printed."""

    def report(*words: str) -> tuple[dict, str]:
        main(["report", *words, "--out", str(tmp_path / "report")])
        results = json.loads((tmp_path / "report/results.json").read_text())
        return results, capsys.readouterr().out

    return report


def test_equal_models_show_no_difference(write, report):
    first = write("first", QUALITY)
    second = write("second", QUALITY)
    results, printed = report(f"before={first}", f"after={second}")
    (entry,) = results["compared"]
    assert (entry["first"], entry["second"]) == ("before", "after"), "in the order given"
    assert {x["difference"] for x in [*entry["sites"], *entry["classes"], entry["best"]]} == {0}
    assert "No difference between after and before is shown: +0.0 [+0.0, +0.0] points" in printed
    assert "Sites that differ, by themselves: none." in printed


def test_a_worse_model_reads_less_where_it_is_worse(write, report):
    first = write("first", QUALITY, number=1)
    second = write("second", WORSE, number=2)
    results, printed = report(f"before={first}", f"after={second}")
    (entry,) = results["compared"]
    by_site = {x["site"]: x for x in entry["sites"]}
    assert [site for site, x in by_site.items() if differs(x)] == [
        "layer_02",
        "layer_03",
        "final_norm",
    ]
    runs = [ProbeRun(path) for path in (first, second)]
    scores = [run.site_scores()["layer_02"] for run in runs]
    expected = scores[1].value - scores[0].value
    assert by_site["layer_02"]["difference"] == pytest.approx(expected)
    assert entry["best"]["difference"] < -0.03 and entry["best"]["ci95"][1] < -0.01
    assert "after reads less than before: −" in printed
    page = (Path(first).parent / "report/index.html").read_text()
    assert "after reads less than before" in page


def merge_classes(run: str, kept: int, lost: int) -> None:
    """Make the probes of a run take one class for another everywhere."""
    file = Path(run) / "counts.safetensors"
    counts = load_file(file)
    counts["predicted"][..., kept] += counts["predicted"][..., lost]
    counts["predicted"][..., lost] = 0
    counts["intersection"][..., lost] = 0
    save_file(counts, file)
    probe_runs.write_effects(Path(run))


def test_a_class_that_a_model_does_not_tell_is_named(write, report):
    first = write("first", QUALITY, number=1)
    second = write("second", QUALITY, number=1)
    merge_classes(second, 0, 1)
    names = ProbeRun(first).metrics["classes"]
    results, printed = report(f"before={first}", f"after={second}")
    (entry,) = results["compared"]
    found = {x["class"] for x in entry["classes"] if class_differs(x)}
    assert found == {names[0], names[1]}, "the other one loses by what it is taken for"
    line = next(
        x for x in printed.splitlines() if x.startswith("IoU at the best layers differs in 2 of")
    )
    assert line.index(names[1]) < line.index(names[0]), "the greatest loss first"


def test_probes_without_a_certificate_are_named(write, report):
    paths = [write(name, QUALITY, solved=True, number=i) for i, name in enumerate("ab")]
    results, printed = report(*(f"{Path(path).name[-1]}={path}" for path in paths))
    assert results["compared"][0]["unconverged"] == {"first": [], "second": []}
    assert "certificate" not in printed.partition("a and b, ")[2]
    file = Path(paths[1]) / "metrics.json"
    metrics = json.loads(file.read_text())
    for entry in metrics["path"]["optimum"]["sites"]:
        chosen = entry["strengths"].index(entry["chosen"])
        entry["certificates"][chosen]["converged"] = entry["site"] != "layer_02"
    file.write_text(json.dumps(metrics))
    results, printed = report(*(f"{Path(path).name[-1]}={path}" for path in paths))
    assert results["compared"][0]["unconverged"] == {"first": [], "second": ["layer_02"]}
    assert "(no certificate of convergence): layer_02 of b." in printed


def test_three_models_have_one_table_of_all_and_each_is_compared_with_the_first(write, report):
    models = {
        "a": QUALITY,
        "b": WORSE,
        "c": QUALITY,
    }
    runs = []
    for i, (name, quality) in enumerate(models.items()):
        run = write(name, quality, number=i)
        runs.append(f"{name}={run}")
    results, printed = report(*runs)
    assert [(x["first"], x["second"]) for x in results["compared"]] == [("a", "b"), ("a", "c")]
    lines = printed.splitlines()
    (title,) = (i for i, line in enumerate(lines) if line.startswith("a, b and c, "))
    assert lines[title + 1].split() == "site a b b − a c c − a".split()
    by_site = {x["site"]: x for x in results["compared"][0]["sites"]}
    row = next(line for line in lines[title:] if line.startswith("layer_02"))
    shown = [f"{100 * by_site['layer_02'][key]:.1f}" for key in ("first", "second")]
    assert row.split()[1:3] == shown
    assert "b reads less than a: −" in printed
    page = (Path(runs[0].partition("=")[2]).parent / "report/index.html").read_text()
    assert page.count("<th>b − a</th><th>c</th><th>c − a</th>") == 1


def study_of_two(write, tmp_path, masks=("causal", "causal")) -> Path:
    """A study of models "zero" and "after", whose folders have other names."""
    for label, name, mask in zip(("zero", "after"), ("r1", "r2"), masks, strict=True):
        run = Path(write(name, QUALITY, mask=mask, mllm=f"models/{name}"))
        (tmp_path / "study" / label).mkdir(parents=True)
        run.rename(tmp_path / "study" / label / "trained")
    return tmp_path / "study"


def test_a_study_of_two_models_keeps_labels_and_order(write, report, tmp_path):
    study = study_of_two(write, tmp_path)
    results, _ = report(str(study), "--labels", "zero", "after")
    (entry,) = results["compared"]
    assert (entry["first"], entry["second"]) == ("zero", "after")
    results, _ = report(str(study))
    assert results["compared"][0]["first"] == "r2", (
        "names of the models, labels in the order of the alphabet"
    )


@pytest.mark.parametrize("masks", [("causal", "causal"), ("causal", "bidirectional")])
def test_a_model_of_a_study_is_not_compared_with_itself(write, report, tmp_path, masks):
    study = study_of_two(write, tmp_path, masks)
    with pytest.raises(SystemExit) as raised:
        report(f"A={study}", f"B={study}/after")
    said = str(raised.value)
    assert f"{study}/after/trained is passed twice, as 'A" in said and "and 'B': one model" in said
    assert not (tmp_path / "report/results.json").exists()


def test_two_masks_of_one_model_are_no_two_models(write, tmp_path):
    study = study_of_two(write, tmp_path, ("causal", "bidirectional"))
    runs = [ProbeRun(study / label / "trained") for label in ("zero", "after")]
    assert labels_of_models(study, runs, ("zero", "after")) == {}


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        (((2, 4), (3, 6)), [(2, 3), (4, 6)]),
        (((1, 4), (3, 4)), [(4, 4)]),  # layer 1 of four has no counterpart
    ],
)
def test_layers_of_equal_relative_depth_are_compared(write, layers, pairs):
    runs = []
    for name, of_model in zip("ab", layers, strict=True):
        sites = ["adapter", *(f"layer_{i:02d}" for i in of_model)]
        runs.append(ProbeRun(write(name, [0.4, 0.5, 0.6], sites=sites)))
    expected = [(f"layer_{a:02d}", f"layer_{b:02d}") for a, b in pairs]
    assert pair_sites(*runs) == [("adapter", "adapter"), *expected]


def test_solved_and_trained_probes_are_not_compared(write, report):
    first = write("first", QUALITY)
    second = write("second", QUALITY, solved=True)
    results, printed = report(f"before={first}", f"after={second}")
    (entry,) = results["compared"]
    assert "sites" not in entry and "make both in the same way" in entry["left_out"]
    assert entry["left_out"] in printed


FLAT = [0.5] * 12
PEAKED = [0.5 - 0.03 * i for i in range(12)]


@pytest.mark.parametrize("first", [FLAT, PEAKED])
def test_intervals_of_best_layers_cover_the_truth_whichever_are_best(first):
    """Equal layers, and one best layer against twelve, where that of the two which look best covers too little."""
    generator = torch.Generator().manual_seed(0)
    spread = 0.02
    covered = 0
    covered_by_best_here = 0
    for _ in range(200):
        models = []
        for true in (first, FLAT):
            observed = torch.tensor(true) + spread * torch.randn(12, generator=generator)
            drawn = observed + spread * torch.randn(300, 12, generator=generator)
            models.append([Estimate(observed[i].item(), drawn[:, i]) for i in range(12)])
        entry = difference_of_best(*models)
        low, high = entry["ci95"]
        covered += low <= 0 <= high
        best = [max(scores, key=lambda score: score.value) for scores in models]
        assert entry["difference"] == pytest.approx(best[1].value - best[0].value)
        low, high = (best[1] - best[0]).ci95
        covered_by_best_here += low <= 0 <= high
    assert covered >= 190
    if first is PEAKED:
        assert covered_by_best_here < 180, "else this test would not tell the two"


def test_the_interval_of_best_layers_is_that_of_all_pairs_together():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 3, generator=generator)
    drawn = scores + 0.1 * torch.randn(400, 2, 3, generator=generator)
    models = []
    for m in (0, 1):
        models.append([Estimate(scores[m, i].item(), drawn[:, m, i]) for i in range(3)])
    observed = {}
    spread = {}
    distances = []
    for b in range(3):
        for a in range(3):
            observed[b, a] = (scores[1, b] - scores[0, a]).item()
            of_pair = (drawn[:, 1, b] - drawn[:, 0, a]).double()
            spread[b, a] = of_pair.std().item()
            distances.append((of_pair - of_pair.mean()).abs() / spread[b, a])
    factor = torch.stack(distances).amax(0).quantile(0.95).item()
    expected = []
    for sign in (-1, 1):
        bound = {}
        for pair, value in observed.items():
            bound[pair] = value + sign * factor * spread[pair]
        least = [min(bound[b, a] for a in range(3)) for b in range(3)]
        expected.append(max(least))
    found = difference_of_best(*models)
    assert found["ci95"] == pytest.approx(expected, abs=1e-6)


def test_differences_have_the_intervals_of_paired_resampling(write):
    """Not those of independent ones: the photos are the same."""
    runs = [ProbeRun(write(name, QUALITY, number=i)) for i, name in enumerate(("a", "b"))]
    entry = compare_runs(*runs)
    scores = [run.site_scores()["layer_02"] for run in runs]
    drawn = (scores[1].resampled - scores[0].resampled).quantile(
        torch.tensor([0.025, 0.975]).double()
    )
    found = next(x for x in entry["sites"] if x["site"] == "layer_02")["ci95"]
    assert found == pytest.approx(drawn.tolist(), abs=2e-3)
    apart = scores[0].resampled.std() + scores[1].resampled.std()
    assert found[1] - found[0] < 2 * apart
    assert len(describe_comparison(entry | {"first": "a", "second": "b"})) >= 2
