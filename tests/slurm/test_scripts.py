"""The job scripts without Slurm: the calls of a fake `sbatch`, and the words of the commands in the jobs."""

import os
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from processes import run_command

from probes.cli import main
from probes.data import ade20k
from probes.studies.plan import plan

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("slurm/*.*s*h"), *ROOT.glob("tests/slurm/*.sh")])
ARMS = ["trained", "random0", "random1", "permuted0", "permuted1", "adapter0", "adapter1"]
MASKS = ["causal", "bidirectional"]
DATA = ["SEGMENTATION", "CAPTIONS", "CAPTION_IMAGES", "INSTRUCTIONS", "INSTRUCTION_IMAGES"]
SBATCH = """case "$*" in
*--test-only*)
  case "$*" in *=nowhere*) echo "allocation failure: Invalid partition name specified" >&2; exit 1 ;; esac ;;
*) echo "$@" >> {0}/calls; wc -l < {0}/calls ;;
esac"""
# refuses one learning rate, estimates all stages alike, and finds no model
PYTHON = """case "$*" in
*"fit "*"annotations /nowhere"*) echo "data.annotations: no file /nowhere"; exit 1 ;;
*"fit "*"_rte"*) echo "unrecognized arguments: --model.learning_rte"; exit 2 ;;
*"fit "*"images /lost"*) echo '{{"gpu_hours": 1, "memory_gb": {{"total": 1}}, "missing_images": ["/lost/1 a.jpg"]}}' ;;
*"fit "*) echo '{{"gpu_hours": 52.04, "memory_gb": {{"total": 39.4}}, "missing_images": []}}' ;;
*"-m "*) echo "no model /nowhere/hf"; exit 1 ;;
*lmms_eval*) ;;
*) exec {1} "$@" ;;
esac"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(path):
    run_command(["bash", "-n", path])
    if shutil.which("shellcheck"):
        run_command(["shellcheck", "-x", path], cwd=ROOT)


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7"}])
def test_a_script_requeues_its_own_job(array):
    command = ["bash", "-c", "source slurm/env.sh; echo $JOB"]
    told = run_command(command, cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "77"} | array).stdout
    assert told.strip() == ("70_7" if array else "77")


def test_study_job_runs_a_study_that_can_be_planned(tmp_path, monkeypatch, checkpoints):
    """Its words are options of `probes study`, which plan what the paper has."""
    (tmp_path / "srun").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "srun").chmod(0o755)
    for mask in MASKS:
        (tmp_path / f"clip-{mask}/stage2").mkdir(parents=True)
        (tmp_path / f"clip-{mask}/stage2/hf").symlink_to(checkpoints[mask])
    there = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEGMENTATION": "masks"}
    job = ["bash", "slurm/study.sbatch", "clip", " ".join(MASKS), "--arms", "trained", "random1"]
    settings = os.environ | there | {"RUNS": str(tmp_path)}
    words = run_command(job, cwd=ROOT, env=settings).stdout.splitlines()
    assert (words[0], words[-1]) == ("job , restart 0", "done"), "what `llava-bidir status` reads"
    planned = []
    monkeypatch.setattr("probes.studies.run.run_study", planned.append)
    monkeypatch.chdir(ROOT)
    main(words[words.index("probes") + 1 : -1])
    ade = MagicMock(classes=["sky", "ceiling", "grass"], __len__=lambda _: 8)  # is on the cluster
    monkeypatch.setattr(
        "probes.studies.plan.open_splits", lambda *_: {"training": ade, "validation": ade}
    )
    steps = {step.name: step for step in plan(planned[0]).steps}
    knockouts = {f"{mask}/{arm}/knockout" for mask in MASKS for arm in ("trained", "random1")}
    assert knockouts | {"bidirectional/trained/sinks", "causal/probes", "report"} < {*steps}
    data = steps["causal/trained"].config.data
    assert (data.dataset, str(data.root)) == ("ade20k", "masks")
    knocked = {*steps["causal/trained/knockout"].config.classes}
    assert {*ade.classes} <= knocked <= {*ade20k.CLASSES}, "Fig. 11 of the paper"


@pytest.fixture
def study(tmp_path):
    """Return a function that runs slurm/submit.sh with a fake sbatch, which records its calls, and a fake python. It
    returns the finished process and the calls as lists of words."""
    for name, text in {"sbatch": SBATCH, "python": PYTHON}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text.format(tmp_path, sys.executable)}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments, check=True, **settings):
        there = dict.fromkeys(DATA, str(tmp_path)) | {"RUNS": str(tmp_path / "runs")}
        there |= dict.fromkeys(["PYTHON", "VQA_PYTHON"], str(tmp_path / "python"))
        there["PYTHONPATH"] = str(ROOT)
        variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | there | settings
        done = run_command(
            [ROOT / "slurm/submit.sh", *arguments], must_pass=check, env=variables, cwd=tmp_path
        )
        calls = tmp_path / "calls"
        return done, [x.split() for x in calls.read_text().splitlines()] if calls.exists() else []

    return run


def dependency(call: list[str]) -> str:
    (words,) = [word for word in call if word.startswith("--dependency=")]
    return words.removeprefix("--dependency=singleton").removeprefix(",afterok")


def script(call: list[str]) -> list[str]:
    """Return the words of a call of sbatch from the script on."""
    (first,) = [i for i, word in enumerate(call) if word.endswith(".sbatch")]
    return call[first:]


def test_dry_run_prints_every_job_with_its_dependencies_and_submits_none(study, tmp_path):
    done, calls = study("--dry-run", "-v")
    expected = []
    for encoder in ("clip", "dinov2", "siglip"):
        for mask in MASKS:
            run = f"{encoder}-{mask}"
            solve = ["--arms", *ARMS, "--only", "solve", "fit", "knockout"]
            expected += [
                (["slurm/stage.sbatch", "1", encoder, mask], ""),
                (["slurm/stage.sbatch", "2", encoder, mask], f":{run}/stage1"),
                (["slurm/study.sbatch", encoder, mask, *solve], f":{run}/stage2"),
                (["slurm/vqa.sbatch", encoder, mask], f":{run}/stage2"),
            ]
        both = "".join(f":{encoder}-{mask}/study" for mask in MASKS)
        expected += [(["slurm/study.sbatch", encoder, *MASKS, "--arms", *ARMS], both)]
    printed = [line.split() for line in done.stdout.splitlines() if line.startswith("sbatch ")]
    assert [(script(call), dependency(call)) for call in printed] == expected
    assert all((ROOT / words[0]).is_file() for words, _ in expected)
    assert calls == [] and not (tmp_path / "runs").exists()


def test_jobs_have_their_dependencies_and_resources(study, tmp_path):
    cluster = {"NODES": "2", "TASKS_PER_NODE": "4", "GRES": "gpu:h100"}
    _, calls = study(ENCODERS="clip", PARTITION="fast", ACCOUNT="me", **cluster)
    # stages, study and benchmarks of both masks; the report
    assert [*map(dependency, calls)] == ["", ":1", ":2", ":2", "", ":5", ":6", ":6", ":3:7"]
    resources = {
        1: {"--account=me", "--partition=fast", "--nodes=2", "--ntasks-per-node=4"},
        2: {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:h100:4", "--cpus-per-task=32"},
        3: {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:h100:4", "--cpus-per-task=32"},
        8: {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:h100:1"},
    }
    for number, words in resources.items():
        assert words <= set(calls[number])
    assert f"--output={tmp_path}/runs/logs/clip-causal-stage2.log" in calls[1]
    assert (tmp_path / "runs/logs").is_dir(), "Slurm does not create folders for logs"


def test_finished_parts_are_skipped_and_nothing_waits_for_them(study, tmp_path):
    (tmp_path / "runs/clip-causal/stage1/hf").mkdir(parents=True)
    _, calls = study(ENCODERS="clip", MASKS="causal", VQA_PYTHON="")
    assert [script(call)[:2] for call in calls] == [
        ["slurm/stage.sbatch", "2"],
        ["slurm/study.sbatch", "clip"],
        ["slurm/study.sbatch", "clip"],
    ]
    assert [*map(dependency, calls)] == ["", ":1", ":2"]


def test_dry_run_has_a_table_with_hours_and_sums(study):
    """Estimated: 52.04 GPU-hours of two stages on 2 x 4 GPUs under two masks. Asked: stages, studies, a report."""
    more = {"NODES": "2", "TASKS_PER_NODE": "4", "TRAINING_TIME": "1-12", "NODE_TIME": "90"}
    done, _ = study("--dry-run", ENCODERS="clip", VQA_PYTHON="", **more)
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 7 + 1
    assert lines[2].split() == "clip-causal/stage2 2 x 4 36.0 6.5 39 clip-causal/stage1".split()
    assert lines[3].split() == "clip-causal/study 1 x 4 1.5 - - clip-causal/stage2".split()
    assert lines[7].endswith(" clip-causal/study, clip-bidirectional/study")
    asked = 4 * 8 * 36 + 2 * 4 * 1.5 + 4
    assert (
        lines[8]
        == f"7 jobs: {asked:.0f} GPU-hours asked, {4 * 8 * 6.5:.0f} estimated for the stages"
    )


def test_help_says_what_the_options_do(study):
    done, calls = study("--help")
    assert "--dry-run -v" in done.stdout and "#" not in done.stdout and calls == []


WRONG = {  # a setting and its value: the beginning of what is said of it
    "CAPTIONS=/nowhere/a.json": "CAPTIONS=/nowhere/a.json does not exist",
    "SEGMENTATION=/nowhere": "SEGMENTATION=/nowhere does not exist",
    "ENCODERS=clip clipp": "ENCODERS=clip clipp: configs/encoder has no clipp.yaml, only ./aimv2.yaml",
    "MASKS=bidirectionl": "MASKS=bidirectionl: bidirectionl is none of causal, bidirectional, prefix",
    "TRAINING_TIME=tomorrow": "TRAINING_TIME=tomorrow: expected HOURS:MINUTES:SECONDS",
    "NODE_TIME=1": "NODE_TIME=1 are 60 s: a job saves and requeues itself before",
    "ONE_GPU_TIME=1:2:3:4": "ONE_GPU_TIME=1:2:3:4: expected",
    "NODES=0": "NODES=0: expected a number from 1",
    "CPUS_PER_TASK=8x": "CPUS_PER_TASK=8x: expected a number",
    "ARMS=trained randm0": "ARMS=trained randm0: randm0 is none of trained, random0,",
    "LAYOUT=ade21k": "LAYOUT=ade21k is no folder, and none of ade20k,",
    "RUNS=/dev/null/runs": "RUNS=/dev/null/runs: cannot write in /dev/null",
    "PARTITION=nowhere": "Slurm refuses --partition=nowhere",
    "VQA_PYTHON=/nowhere": "VQA_PYTHON=/nowhere is no Python with lmms-eval",
    "PYTHON=/nowhere/python": "PYTHON=/nowhere/python: there is no such program",
}


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_mistake_submits_nothing_and_all_that_is_missing_is_named_at_once(study, more):
    done, calls = study(*more, check=False, **dict(word.split("=", 1) for word in WRONG))
    assert done.returncode == 1 and calls == []
    told = done.stderr.splitlines()
    assert len(told) == len(WRONG)
    for text in WRONG.values():
        (line,) = [line for line in told if line.startswith(f"slurm/env.sh: {text}")]


def test_images_that_are_not_where_the_annotations_say_are_named_before_a_stage_is_submitted(
    study, tmp_path
):
    lost = tmp_path / "lost"
    lost.mkdir()
    python = tmp_path / "python"
    python.write_text(python.read_text().replace("/lost", str(lost)))
    done, calls = study(check=False, ENCODERS="clip", INSTRUCTION_IMAGES=str(lost))
    assert done.stderr == f"slurm/env.sh: STAGE2, clip: there is no image {lost}/1 a.jpg\n"
    assert calls == []


def test_options_that_a_command_refuses_are_named_with_their_setting(study):
    wrong = {"STAGE2": "-c stage2 --model.learning_rte 1", "CAPTIONS": "/nowhere"}
    done, calls = study(check=False, ENCODERS="clip", **wrong)
    assert done.stderr.splitlines() == [
        "slurm/env.sh: CAPTIONS=/nowhere does not exist",
        "slurm/env.sh: STAGE2, clip: unrecognized arguments: --model.learning_rte",
    ]
    assert calls == []
    done, calls = study("--dry-run=yes", check=False)
    assert done.returncode == 2 and "usage: " in done.stderr
