"""The demo: what it finds, what is done twice, and what is not.

With WHEEL=FOLDER, as in `.ci/run`, it is made by the wheel that is installed there without the clone.
"""

import html
import json
import os
import sys
from pathlib import Path

import network_guard
import pytest
from processes import HANGING_S, run_command

ROOT = Path(__file__).parents[1]
if given := os.environ.get("WHEEL"):
    # from which nothing else can be imported
    FOLDER = Path(given).absolute() / "dist"
    PROGRAM = [str(FOLDER.parent / "environment/bin/probes")]
else:
    FOLDER = ROOT
    PROGRAM = [sys.executable, "-m", "probes"]

pytestmark = pytest.mark.slow


def command(out: Path, *more: str) -> list[str]:
    return [*PROGRAM, "demo", "--out", str(out), "--scale", "0.02", *more]


def run(out: Path) -> str:
    """Without a network where that can be had, and watched for attempts to reach one."""
    words = [*network_guard.cut(), *command(out)]
    watched = network_guard.watched(out / "network")
    return run_command(words, cwd=FOLDER, env=watched, timeout=2 * HANGING_S).stdout


def results(out: Path) -> dict:
    """Everything but what tells where."""
    return json.loads((out / "report/results.json").read_text().replace(str(out), "OUT"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    run(out)
    return out


def test_claims_have_the_truth_that_was_planted_of_both_kinds(finished):
    studies = results(finished)["studies"]
    truth = {
        (study["model"], claim["claim"], claim["image_attention"]): claim["truth"]
        for study in studies
        for claim in study["claims"]
        if "truth" in claim
    }
    for mask in ("causal", "bidirectional"):
        assert truth.pop(("trained", "recovery", mask)) == "planted"
    assert truth.pop(("LLM shuffled", "recovery", "bidirectional")) == "absent"
    assert truth.pop(("adapter merged", "adapter_drop", "bidirectional")) == "planted"
    assert truth.pop(("adapter intact", "adapter_drop", "bidirectional")) == "absent"
    page = html.unescape((finished / "report/index.html").read_text())
    assert all(study["model"] in page for study in studies) and "clip + llm" not in page
    assert "Known truth:" in page
    assert {claim for _, claim, _ in truth} == {"starvation", "starvation_first_row"}


@pytest.mark.nightly  # a model of CI's small demo has learned too little
def test_hidden_cues_of_the_own_scene_are_missed_more_than_those_of_another(demo):
    runs = [str(demo / name / "trained") for name in ("causal", "bidirectional", "shuffled")]
    done = run_command([sys.executable, "experiments/toy/cues.py", *runs], cwd=ROOT)
    differences = [
        float(line.split("difference ")[1].split()[0]) for line in done.stdout.splitlines()
    ]
    probes, answers = differences[::2], differences[1::2]  # a line each by run
    assert min(probes[:2]) > probes[2], done.stdout
    assert min(answers[:2]) > answers[2], done.stdout


def test_no_network_is_reached_for(finished):
    assert network_guard.reached_for(finished / "network") == []


def test_second_run_does_nothing(finished):
    assert "nothing to do" in run(finished)


def test_a_demo_of_other_settings_is_left_alone(finished):
    before = results(finished)
    done = run_command(command(finished, "--seed", "7"), must_pass=False, cwd=FOLDER)
    assert done.returncode == 1
    assert "holds a result of seed 0, scale 0.02;" in done.stderr
    assert results(finished) == before


def test_deleted_result_is_made_again_with_what_follows_and_nothing_else(finished):
    before = results(finished)
    (finished / "causal/probes/metrics.json").unlink()
    said = run(finished).splitlines()
    steps = {line.split("] ")[1].split(",")[0] for line in said if line.startswith("[")}
    assert steps == {"causal/probes", "causal/probes/sinks", "report"}
    assert results(finished) == before
