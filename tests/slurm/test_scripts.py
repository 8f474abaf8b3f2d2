"""The job scripts without Slurm: the calls of a fake `sbatch`, and the words of the commands in the jobs."""

import os
import shutil
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
DATA = [
    "PYTHON",
    "VQA_PYTHON",
    "SEGMENTATION",
    "CAPTIONS",
    "CAPTION_IMAGES",
    "INSTRUCTIONS",
    "INSTRUCTION_IMAGES",
]


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
    monkeypatch.setattr("probes.studies.plan.open_splits", lambda data: {"validation": ade})
    steps = {step.name: step for step in plan(planned[0]).steps}
    knockouts = {f"{mask}/{arm}/knockout" for mask in MASKS for arm in ("trained", "random1")}
    assert knockouts | {"bidirectional/trained/sinks", "causal/probes", "report"} < {*steps}
    data = steps["causal/trained"].config.data
    assert (data.dataset, str(data.root)) == ("ade20k", "masks")
    knocked = {*steps["causal/trained/knockout"].config.classes}
    assert {*ade.classes} <= knocked <= {*ade20k.CLASSES}, "Fig. 11 of the paper"


@pytest.fixture
def study(tmp_path):
    """Return a function that runs slurm/submit.sh with a fake sbatch, which records its calls. It returns the finished
    process and the calls as lists of words."""
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls; wc -l < {tmp_path}/calls\n'
    )
    (tmp_path / "sbatch").chmod(0o755)

    def run(*arguments, check=True, **settings):
        there = dict.fromkeys(DATA, str(tmp_path)) | {"RUNS": str(tmp_path / "runs")}
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
    done, calls = study("--dry-run", CAPTIONS="/nowhere")
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
    printed = [line.split() for line in done.stdout.splitlines()]
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


def test_a_mistake_submits_nothing_and_all_that_is_missing_is_named_at_once(study):
    done, calls = study("--dry-run=yes", check=False)
    assert done.returncode == 2 and "usage: " in done.stderr
    done, calls = study(check=False, PYTHON="/nowhere/python", CAPTIONS="/nowhere/a.json")
    assert done.stderr.splitlines() == [
        "slurm/env.sh: PYTHON=/nowhere/python does not exist",
        "slurm/env.sh: CAPTIONS=/nowhere/a.json does not exist",
    ]
    assert calls == []
