"""Controls of a study: which run is which control, in whatever order they are passed, and where they are compared."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
from probe_runs import write_effects
from report_parts import CURVE, FLAT, claims_of, studies_of
from safetensors.torch import load_file, save_file

from llava_bidir.common.files import read_json
from probes.report.claims import evaluate_claims
from probes.report.page import write_report
from probes.runs.study import CONTROLS

MASKS = ("causal", "bidirectional")


def set_accuracy_of_patch_0(run: str, accuracy: list[float]) -> None:
    """Give every site another pixel accuracy under the first patch."""
    file = Path(run) / "counts.safetensors"
    tensors = load_file(file)
    for site, share in enumerate(accuracy):
        tensors["patch_right"][site, :, 0] = (tensors["patch_valid"][:, 0] * share).long()
    save_file(tensors, file)
    write_effects(file.parent)


def test_starvation_of_a_model_and_its_controls_is_compared_at_one_layer(write, draws):
    """Solved and trained probes have their best layers elsewhere; all solved runs have the same gaps at each layer."""
    peaks = {
        "trained": [
            0.5,
            0.4,
            0.5,
            0.9,
            0.7,
            0.7,
        ],
        "solved": [
            0.5,
            0.4,
            0.9,
            0.7,
            0.6,
            0.6,
        ],
    }
    runs = []
    for mask in MASKS:
        runs.append(write("trained", peaks["trained"], mask=mask))
        solved = [
            write(
                "solved",
                peaks["solved"],
                5,
                mask=mask,
                solved=True,
            )
        ]
        solved += draws(peaks["solved"], peaks["solved"], mask=mask, first=7)
        for run in solved:
            gap = (
                [
                    0,
                    0,
                    0.1,
                    0.3,
                    0,
                    0,
                ]
                if mask == "bidirectional"
                else [0] * 6
            )
            set_accuracy_of_patch_0(run, [0.3 + x for x in gap])
        runs += solved
    (study,) = studies_of(runs)
    assert study.main_runs["causal"].peak_layer == "layer_02"
    assert study.solved["causal"].peak_layer == "layer_01"
    (claim,) = [claim for claim in evaluate_claims(study) if claim["claim"] == "starvation"]
    assert claim["verdicts"]["optimum"]["value"] == pytest.approx(0.1, abs=0.01)
    beyond = claim["verdicts"]["beyond_random"]
    assert beyond["value"] == pytest.approx(0, abs=1e-9)
    assert beyond["verdict"] == "does not hold"


@pytest.mark.parametrize(
    ("part", "matches"), [("llm", ("update", "permuted")), ("adapter", ("none",))]
)
def test_draws_are_paired_by_their_number(part, matches, write):
    """Under one mask there is a draw that the other lacks, and runs are passed in another order."""
    trained = [write("trained", CURVE, mask=mask) for mask in MASKS]
    random = []
    for match, (mask, numbers) in product(
        matches, {"causal": (0, 2, 1), "bidirectional": (1, 2)}.items()
    ):
        for i in numbers:
            weights = {
                "untrained": [part],
                "match": match,
                "draw": i,
                "mask": mask,
            }
            random.append(write(f"{match[0]}{i}", FLAT, 3 + i, **weights))
    for order in (trained + random, trained + random[::-1]):
        (study,) = studies_of(order)
        found = study.draws(*CONTROLS[part], solved=False)
        assert [{*runs} for runs in found] == [{"causal"}, {*MASKS}, {*MASKS}]
        numbers = [{run.metrics["draw"] for run in runs.values()} for runs in found]
        assert numbers == [{0}, {1}, {2}]
    weights = {
        "untrained": [part],
        "match": matches[0],
        "draw": 1,
    }
    with pytest.raises(ValueError, match="are both the .* run of draw 1 under .*; pass only one"):
        studies_of([*order, write("again", FLAT, 9, **weights)])


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


def test_solved_probes_count_as_converged_at_the_strength_that_was_chosen(write, tmp_path):
    run = write("solved", CURVE, solved=True)
    file = tmp_path / "causal_solved/metrics.json"

    def optimum():
        return claims_of([run])["recovery"]["verdicts"]["optimum"]

    assert optimum()["verdict"] == "holds"
    metrics = json.loads(file.read_text())
    for entry in metrics["path"]["optimum"]["sites"]:
        chosen = entry["strengths"].index(entry["chosen"])
        certificate = entry["certificates"][chosen]
        certificate["converged"] = entry["site"] == "adapter"
    file.write_text(json.dumps(metrics))
    write_effects(file.parent)
    assert optimum()["verdict"] == "untested"
    expected = (
        f"probes of {run} have not converged at the chosen strength at layer_01, layer_02, layer_03"
    )
    assert optimum()["reason"].startswith(expected)
