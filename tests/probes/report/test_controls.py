"""Controls of a study: which run is which control, in whatever order they are passed, and where they are compared."""

import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from probe_runs import write_effects
from report_parts import CURVE, FLAT, claims_of, studies_of
from safetensors.torch import load_file, save_file
from task_runs import write_depth_run

from llava_bidir.common.files import read_json
from probes.report.claims import evaluate_claims
from probes.report.page import write_report
from probes.runs.study import CONTROLS

MASKS = ("causal", "bidirectional")
RMSE = [0.5, 0.6, 0.6, 0.5, 0.5, 0.5]


def change_patch_0(run: str, valid: int, shares=(0,) * 6) -> None:
    """Label `valid` pixels of the first patch of each image, of which a run has a share right at each site."""
    file = Path(run) / "counts.safetensors"
    tensors = load_file(file)
    tensors["patch_valid"][:, 0] = valid
    tensors["patch_class"][:, 0] = 0 if valid else -1
    tensors["patch_right"][..., 0] = (torch.tensor(shares) * valid).long()[:, None]
    save_file(tensors, file)
    write_effects(file.parent)


def test_starvation_of_a_model_and_its_controls_is_compared_at_one_layer(write, draws):
    """Solved and trained probes have their best layers elsewhere; all solved runs have the same gaps at each layer."""
    runs = []
    best_first = [*CURVE[:2], 0.9, 0.7, 0.6, 0.6]
    best_second = [*CURVE[:3], 0.9, 0.7, 0.7]
    shares = {"causal": [0.3] * 6, "bidirectional": [0.3, 0.3, 0.4, 0.6, 0.3, 0.3]}
    for mask in MASKS:
        solved = [write("solved", best_first, 5, mask=mask, solved=True)]
        solved += draws(best_first, best_first, mask=mask)
        runs += [write("trained", best_second, mask=mask), *solved]
        for run in solved:
            change_patch_0(run, 100, shares[mask])
    (study,) = studies_of(runs)
    assert study.main_runs["causal"].peak_layer == "layer_02"
    assert study.solved["causal"].peak_layer == "layer_01"
    (claim,) = [claim for claim in evaluate_claims(study) if claim["claim"] == "starvation"]
    assert claim["verdicts"]["optimum"]["value"] == pytest.approx(0.1, abs=0.01)
    beyond = claim["verdicts"]["beyond_random"]
    assert beyond["value"] == pytest.approx(0, abs=1e-9)
    assert beyond["verdict"] == "does not hold"


def test_a_patch_that_is_never_labelled_has_no_accuracy_and_no_claim(write, tmp_path, capsys):
    """Such as the padding of landscape photos. Readers of other languages can parse the file: JSON has no NaN."""
    for mask in MASKS:
        change_patch_0(write("run", CURVE, mask=mask), 0)
    write_report([str(tmp_path)], tmp_path / "report")
    written = (tmp_path / "report/results.json").read_text()
    results = json.loads(written, parse_constant=pytest.fail)
    for patches in (results["starvation"], results["starvation"]["by_class"]):
        assert patches["gap"][0] is None
        assert patches["gap_ci95"][0] == [None, None]
        assert all(math.isfinite(gap) for gap in patches["gap"][1:])
    claims = {entry["claim"] for entry in results["claims"]}
    assert claims & {"starvation", "starvation_first_row"} == {"starvation_first_row"}
    assert "nan" not in capsys.readouterr().out
    assert ">nan" not in (tmp_path / "report/index.html").read_text()


@pytest.mark.parametrize(
    ("part", "matches"), [("llm", ("update", "permuted")), ("adapter", ("none",))]
)
def test_draws_are_paired_by_their_number(part, matches, write):
    """Under one mask there is a draw that the other lacks, and runs are passed in another order."""
    trained = [write("trained", CURVE, mask=mask) for mask in MASKS]
    random = []
    numbers = {"causal": (0, 2, 1), "bidirectional": (1, 2)}
    for match, mask in product(matches, MASKS):
        for i in numbers[mask]:
            weights = {"untrained": [part], "match": match, "draw": i}
            random.append(write(f"{match}{i}", FLAT, 3 + i, mask=mask, **weights))
    for order in (trained + random, trained + random[::-1]):
        (study,) = studies_of(order)
        draws = study.draws(*CONTROLS[part], solved=False)
        assert [{*runs} for runs in draws] == [{"causal"}, {*MASKS}, {*MASKS}]
        drawn = [{run.metrics["draw"] for run in runs.values()} for runs in draws]
        assert drawn == [{0}, {1}, {2}]
    again = write("again", FLAT, 9, **weights)
    with pytest.raises(ValueError, match="are both the .* run of draw 2 under .*; pass only one"):
        studies_of([*order, again])


def test_runs_of_another_task_neither_split_a_study_nor_stand_for_its_trained_model(
    write, root, tmp_path, caplog
):
    runs = [write("trained", CURVE), tmp_path / "other_seed", tmp_path / "control"]
    write_depth_run(runs[1], RMSE, root, metrics={"seed": 1})
    control = {"untrained": ["llm"], "dataset": "other"}
    write_depth_run(runs[2], RMSE, root, metrics=control)
    found = {(study.task.name, study.dataset): study.seed for study in studies_of(runs)}
    assert found == {("segmentation", "toy world"): None, ("depth", "toy world"): None}
    assert "control is left out: no run of the trained model" in caplog.text


def test_fewer_than_ten_groups_of_photos_are_said(write, tmp_path):
    write("run", CURVE, options={"groups": torch.arange(40) % 3})
    out = tmp_path / "report"
    write_report([str(tmp_path)], out)
    assert "<b>40 photos in 3 groups tell next to nothing" in (out / "index.html").read_text()
    assert "fewer than 10 photos, or groups" in "".join(read_json(out / "results.json")["summary"])


def test_files_of_an_earlier_report_are_removed(write, tmp_path):
    """Others in its folder stay."""
    runs = [write("trained", CURVE, mask=mask) for mask in MASKS]
    out = tmp_path / "report"
    write_report([str(tmp_path)], out)
    assert (out / "starvation.csv").is_file() and (out / "differences.csv").is_file()
    (out / "notes.html").write_text("kept")
    shutil.rmtree(runs[1])
    write_report([str(tmp_path)], out)
    assert not (out / "starvation.csv").exists() and not (out / "differences.csv").exists()
    listed = read_json(out / "results.json")["files"]
    expected = {"index.html", "results.json", "notes.html", *listed}
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == expected


@pytest.mark.parametrize(("row", "verdict"), [("weaker", "holds"), ("chosen", "untested")])
def test_solved_probes_count_as_converged_at_the_strength_that_was_chosen(row, verdict, write):
    """The layers' have not at one strength, the adapter's have at all."""
    layers = ("layer_01", "layer_02", "layer_03")
    options = {"unconverged": [(row, site) for site in layers]}
    run = write("solved", CURVE, solved=True, options=options)
    optimum = claims_of([run])["recovery"]["verdicts"]["optimum"]
    assert optimum["verdict"] == verdict
    if verdict == "untested":
        said = f"probes of {run} have not converged at the chosen strength at {', '.join(layers)}"
        assert optimum["reason"].startswith(said)
