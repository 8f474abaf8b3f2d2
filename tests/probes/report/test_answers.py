"""The section "Answers" of the report."""

import json

import numpy as np
import probe_runs
import pytest
import torch

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.errors import UserError
from probes.analyses.answers.inference import CONDITIONS, answer_statistics, beyond_random
from probes.report.page import write_report
from probes.results.probe_run import ProbeRun

QUALITY = [0.5, 0.45, 0.6, 0.65, 0.64]
QUESTIONS = 90


def write_answers(run: ProbeRun, skill: float, seed: int, questions: str = "same") -> None:
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
        "questions_sha256": questions,
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

    random = [{"untrained": ["llm"], "match": "update", "draw": draw} for draw in (0, 1)]
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
        write_answers(run, skill=2.0 if seed == 0 else 0.0, seed=seed)
    results, page = report(runs, tmp_path / "report")
    assert results["claims"] == before["claims"], "exploratory: no claim, no verdict"
    trained, *random = own = [run.analysis("answers.json") for run in runs]
    answers = results["masks"]["causal"]["answers"]
    assert (answers["accuracy"], answers["sites"]) == (trained["accuracy"], trained["sites"])
    assert [entry["accuracy"] for entry in answers["random"]] == [x["accuracy"] for x in random]

    def difference(*values: float) -> float:
        return pytest.approx(values[0] - np.mean(values[1:]))

    beyond = answers["beyond_random"]
    assert beyond["draws"] == 2
    assert beyond["accuracy"]["value"] == difference(*(x["accuracy"]["value"] for x in own))
    assert beyond["accuracy"]["value"] > 0.2
    for i, effect in enumerate(beyond["effects"]):
        of_runs = [x["effects"][i]["mean"]["value"] for x in own]
        assert effect["mean"]["value"] == difference(*of_runs)
    assert f"of {QUESTIONS} questions, the right class" in page


def test_only_answers_to_the_same_questions_are_compared(runs):
    assert beyond_random(runs[0], []) is None
    write_answers(runs[0], 2.0, 0)
    write_answers(runs[1], 0.0, 1, questions="other")
    with pytest.raises(UserError, match="were asked different questions"):
        beyond_random(runs[0], runs[1:2])
