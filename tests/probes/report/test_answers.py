"""The section "Answers" of the report."""

import csv
import json

import numpy as np
import probe_runs
import pytest
import torch
from safetensors.torch import load_file

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.errors import UserError
from probes.analyses.answers.inference import CONDITIONS, answer_statistics, beyond_random
from probes.report.page import write_report
from probes.results.probe_run import ProbeRun

QUALITY = [0.5, 0.45, 0.6, 0.65, 0.64]
QUESTIONS = 90


def write_answers(
    run: ProbeRun,
    skill: float,
    seed: int,
    sha256: str = "x",
) -> None:
    """Write answers to the same questions; the right answer is `skill` logits above the others."""
    classes = run.metrics["classes"]
    generator = torch.Generator().manual_seed(seed)
    right = torch.arange(QUESTIONS) % len(classes)
    tensors = {
        "image": torch.arange(QUESTIONS) // 2,
        "right": right,
        "wrong": (right + 1) % len(classes),
    }
    for reader in ("answer", *(f"probe:{site}" for site in run.sites)):
        logits = torch.randn(QUESTIONS, len(classes), generator=generator)
        logits[torch.arange(QUESTIONS), right] += skill
        tensors[reader] = logits.log_softmax(-1)
    for condition in CONDITIONS:
        tensors[f"right:{condition}"] = (
            torch.randn(QUESTIONS, generator=generator) - (condition == "correct") * skill
        )
    header = {
        "runs": [run.fingerprint],
        "classes": classes,
        "seed": 0,
        "questions_sha256": sha256,
    }
    statistics = answer_statistics(tensors, run.sites, classes, 0)
    write_files(
        {run.path / "answers.safetensors": tensors, run.path / "answers.json": header | statistics}
    )


@pytest.fixture
def runs(tmp_path, segmentation) -> list[ProbeRun]:
    """A trained run and two draws of a random LLM."""

    def write(name, **kwargs):
        return ProbeRun(probe_runs.write_run(tmp_path / name, QUALITY, root=segmentation, **kwargs))

    random = [
        {
            "untrained": ["llm"],
            "match": "update",
            "draw": draw,
        }
        for draw in (0, 1)
    ]
    return [
        write("trained"),
        *(write(f"random{i}", metrics=metrics, seed=1 + i) for i, metrics in enumerate(random)),
    ]


def report(runs, out) -> tuple[dict, str]:
    write_report([str(run.path) for run in runs], out)
    return json.loads((out / "results.json").read_text()), (out / "index.html").read_text()


def test_answers_are_reported_beside_random_llms_and_outside_of_the_claims(runs, tmp_path):
    before, _ = report(runs, tmp_path / "before")
    for seed, run in enumerate(runs):
        write_answers(run, 2.0 * (seed == 0), seed)
    results, page = report(runs, tmp_path / "report")
    assert results["claims"] == before["claims"], "exploratory: no claim, no verdict"
    answers = results["masks"]["causal"]["answers"]
    own = [run.analysis("answers.json") for run in runs]
    assert answers["accuracy"] == own[0]["accuracy"]
    assert answers["sites"] == own[0]["sites"]
    assert [(entry["draw"], entry["accuracy"]) for entry in answers["random"]] == [
        (draw, own[1 + draw]["accuracy"]) for draw in (0, 1)
    ]
    beyond = answers["beyond_random"]
    assert beyond["draws"] == 2
    accuracy = [found["accuracy"]["value"] for found in own]
    difference = accuracy[0] - np.mean(accuracy[1:])
    assert beyond["accuracy"]["value"] == pytest.approx(difference)
    assert difference > 0.2
    effect = [found["effects"][2]["mean"]["value"] for found in own]
    assert beyond["effects"][2]["mean"]["value"] == pytest.approx(effect[0] - np.mean(effect[1:]))
    assert "<h2>Answers</h2>" in page
    rows = list(csv.DictReader((tmp_path / "report/answers.csv").open()))
    models = {(row["model"], row["class"]) for row in rows}
    assert {
        ("trained", "mean over classes"),
        ("beyond random", "mean over classes"),
        ("trained", "sky"),
    } <= models
    accuracies = list(csv.DictReader((tmp_path / "report/answer_accuracy.csv").open()))
    assert len(accuracies) == 3 * (1 + len(runs[0].sites))
    assert float(accuracies[0]["accuracy"]) == own[0]["accuracy"]["value"]
    tensors = load_file(runs[1].path / "answers.safetensors")
    tensors["image"] = tensors["image"].flip(0)
    write_files({runs[1].path / "answers.safetensors": tensors})
    with pytest.raises(UserError, match="were asked different questions"):
        beyond_random(runs[0], runs[1:])
