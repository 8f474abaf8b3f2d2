"""The job scripts on a real Slurm with two tasks and toy models: signals, requeueing, the complete study."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_models
import torch
from processes import HANGING_S, run_command
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
JOBS = 2 * 3 + 1  # of one encoder
PROBES = "-c configs/demo/probes.yaml --data.batch_size 2 --data.name toy"
ZERO = "zero3.yaml --trainer.strategy.class_path=zero_on_cpu.ZeROOnCPU "
ZERO += f"--import {ROOT}/tests/helpers/zero_on_cpu.py"
ALONE = {"TASKS_PER_NODE": "1", "STRATEGY": "-c configs/cluster/ddp.yaml --trainer.accelerator cpu"}
ON_THE_WAY = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, str]:
    """Return the variables of slurm/env.sh for toy models and one encoder."""
    folder = tmp_path_factory.mktemp("toy")
    encoder, llm = tiny_models.write_parts(folder)
    tiny_models.write_conversations(folder, count=96, text_only=16)
    segmentation = str(tiny_models.write_segmentation(folder / "photos/segmentation"))
    entry = {"name": "clip", "path": encoder.path, "layer": encoder.layer}
    (folder / "clip.yaml").write_text(json.dumps({"model": {"encoder": entry}}))
    data = str(folder / "data.json")
    sizes = "--data.batch_size 8 --data.micro_batch_size 2 --trainer.log_every_n_steps 1"
    return {
        "GRES": "",
        "TASKS_PER_NODE": "2",
        "CPUS_PER_TASK": "1",
        "PYTHON": sys.executable,
        "STRATEGY": f"-c configs/cluster/{ZERO if find_spec('deepspeed') else 'ddp.yaml'} --trainer.accelerator cpu",
        "RUNS": str(folder / "runs"),
        "LLM": llm,
        "ENCODERS": "clip",
        "ENCODER_CONFIGS": str(folder),
        "CAPTIONS": data,
        "CAPTION_IMAGES": str(folder),
        "INSTRUCTIONS": data,
        "INSTRUCTION_IMAGES": str(folder),
        "STAGE1": f"-c configs/demo/stage1.yaml --data.template vicuna_v1 {sizes}",
        "STAGE2": f"-c configs/demo/stage2.yaml --data.val_annotations {data} {sizes}",
        "LAYOUT": segmentation,
        "SEGMENTATION": segmentation,
        "ARMS": "trained random0 random1 permuted0 permuted1",
        "STUDY": f"{PROBES} --fit --add knockout.draws=1",
        "VQA_PYTHON": "",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests/helpers")]
        ),
    }


def shell(command: str, settings: dict[str, str]) -> str:
    """Run a command line after slurm/env.sh and return its output."""
    line = f"set -euo pipefail; source slurm/env.sh; {command}"
    return run_command(["bash", "-c", line], cwd=ROOT, env=os.environ | settings).stdout


def job_state(job: str) -> dict[str, str]:
    """Return the state of a job."""
    shown = run_command(["scontrol", "show", "job", job]).stdout
    return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)


def wait_until(done, job: str, log: Path) -> dict[str, str]:
    """Return the state of the job as soon as `done` is true for it; fail if the job ends before."""
    deadline = time.monotonic() + HANGING_S
    while not done(state := job_state(job)):
        if state["JobState"] not in ON_THE_WAY or time.monotonic() > deadline:
            subprocess.run(["scancel", job])
            output = log.read_text()[-3000:] if log.exists() else "no output"
            pytest.fail(f"job {job} is {state['JobState']} (reason {state['Reason']}):\n{output}")
        time.sleep(0.2)
    return state


def submit(script: str, settings: dict[str, str], log: Path, more: str = "") -> str:
    """Submit a script with further options `more` of its command. Return the job id."""
    words = "$NODE slurm/study.sbatch"
    if script != "study":
        words = f"$TRAINING slurm/stage.sbatch {script.removeprefix('stage')}"
    command = f"sbatch --parsable --output={log} {words} clip causal {more}"
    return shell(command, settings).strip()


def ended(job: str, log: Path) -> dict[str, str]:
    return wait_until(lambda state: state["JobState"] not in ON_THE_WAY, job, log)


def complete(job: str, log: Path) -> None:
    assert ended(job, log)["JobState"] == "COMPLETED", log.read_text()[-3000:]


def statuses(settings: dict[str, str]) -> dict[str, dict]:
    """Return what `llava-bidir status` says of each step, by MODEL/STEP."""
    rows = json.loads(shell("$PYTHON -m llava_bidir status $RUNS --json", settings))
    return {f"{row['model']}/{row['step']}": row for row in rows}


def await_status(settings: dict[str, str], name: str, **wanted) -> None:
    """Wait until a step has these values."""
    deadline = time.monotonic() + HANGING_S
    while not wanted.items() <= (rows := statuses(settings)).get(name, {}).items():
        assert time.monotonic() < deadline, rows
        time.sleep(1)


def lines_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_interrupted_training_with_skewed_ranks_equals_uninterrupted(settings, tmp_path):
    """Stage 2 is requeued in mid-epoch, stopped in mid-epoch and submitted again: every loss once, equal weights."""
    log = tmp_path / "log"
    complete(submit("stage1", settings, log), log)
    skew = f"--import {ROOT}/tests/slurm/skew.py --trainer.callbacks+=skew.Skew "
    skew += f"--trainer.callbacks.seconds=0.2 --trainer.callbacks.losses={tmp_path}"
    complete(submit("stage2", settings=settings, log=log, more=f"{skew}/whole"), log)

    out = Path(settings["RUNS"]) / "clip-causal/interrupted"
    interrupted = ("stage2", settings, tmp_path / "cut.log", f"{skew}/cut --out {out}")
    log = tmp_path / "cut.log"
    job = submit(*interrupted)
    for micro_batches, number in ((5, "USR1"), (13, "TERM")):
        wait_until(lambda state: len(lines_of(tmp_path / "cut")) >= micro_batches, job, log)  # noqa: B023
        subprocess.run(["scancel", f"--signal={number}", job], check=True)
    stopped = ended(job, log)
    assert stopped["Restarts"] == "1" and stopped["JobState"] == "FAILED", (
        "dependent jobs must not start"
    )
    assert not (out / "hf").exists()
    complete(submit(*interrupted), log)

    whole, cut = (lines_of(tmp_path / name) for name in ("whole", "cut"))
    assert len(whole) == 24
    assert [row[1:] for row in whole] == [row[1:] for row in cut]
    assert {row[0] for row in cut} == {"0", "1"}, "resumed after it was requeued"
    expected, weights = (
        load_file(folder / "hf/model.safetensors") for folder in (out.with_name("stage2"), out)
    )
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())

    complete(submit(*interrupted), log)
    assert "this run is finished; nothing to do" in log.read_text()
    assert len(lines_of(tmp_path / "cut")) == 24


def test_study_of_an_encoder_runs_to_the_report(settings, tmp_path):
    """Other encoders add jobs of the same scripts; test_scripts.py checks the calls for all six."""
    settings = settings | ALONE | {"RUNS": str(tmp_path)}
    lines = shell("slurm/submit.sh", settings).splitlines()
    again = shell("slurm/submit.sh", settings).splitlines()
    names, left = ([line.split()[1] for line in text] for text in (lines, again))
    assert len(names) == JOBS
    assert {"clip/report"} <= set(left) <= set(names)  # toy stages may end before the second call
    for line in lines + again:  # the second ones find finished what the first ones have made
        job, name = line.split()
        complete(job, tmp_path / "logs" / f"{name.replace('/', '-')}.log")
    results = json.loads((tmp_path / "clip/report/results.json").read_text())
    verdicts = {claim["claim"]: claim["verdicts"] for claim in results["claims"]}
    assert verdicts["recovery"]["beyond_random"]["draws"] == 2
    for mask in ("causal", "bidirectional"):
        assert all(
            (tmp_path / f"clip/{mask}/{arm}/knockout.json").is_file()
            for arm in ("trained", "random1", "probes")
        )
    assert (tmp_path / "clip/bidirectional/trained/sinks.json").is_file()
    assert {row["state"] for row in statuses(settings).values()} == {"done"}
    assert shell("slurm/submit.sh", settings) == "", "nothing is left to submit"


def test_status_follows_a_job_that_is_requeued_and_one_that_dies(settings, tmp_path):
    """Both are slowed down. A dry run before submits nothing."""
    slow = f"--import {ROOT}/tests/slurm/skew.py --trainer.callbacks+=skew.Skew "
    slow += f"--trainer.callbacks.seconds=1 --trainer.callbacks.losses={tmp_path}/losses"
    settings = settings | ALONE | {"RUNS": str(tmp_path / "runs")}
    settings["STAGE1"] += f" {slow}"
    table = shell("slurm/submit.sh --dry-run", settings).splitlines()
    assert len(table) == 1 + JOBS + 1 and not (tmp_path / "runs").exists()
    lines = shell("slurm/submit.sh", settings).splitlines()
    jobs = {name: job for job, name in map(str.split, lines)}
    try:
        for mask in ("causal", "bidirectional"):
            await_status(settings, name=f"clip-{mask}/stage1", state="running", of=12)
        rows = statuses(settings)
        waiting = rows["clip-causal/stage2"]
        assert (waiting["state"], waiting["reason"]) == ("waiting", "Dependency")
        signals = {"clip-causal/stage1": "USR1", "clip-bidirectional/stage1": "KILL"}
        for name, number in signals.items():
            subprocess.run(["scancel", f"--signal={number}", jobs[name]], check=True)
        await_status(settings, name="clip-bidirectional/stage1", state="failed")
        await_status(settings, name="clip-causal/stage1", state="running", requeues=1)
        await_status(settings, name="clip-causal/stage1", state="done", done=12)
    finally:
        subprocess.run(["scancel", *jobs.values()])
    await_status(
        settings, name="clip-bidirectional/stage2", state="waiting", reason="not in the queue"
    )
