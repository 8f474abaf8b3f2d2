"""`llava-bidir status`: each state of a step from files, logs and a queue, and how far a training really is."""

import json
from pathlib import Path

import pytest
import tiny_models
from processes import inside

import llava_bidir.cli
from llava_bidir.commands.status import StepStatus, describe
from llava_bidir.common.files import exclusive_run_lock

KILLED = """job 7, restart 0
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
[rank0]:[W123 ProcessGroupNCCL.cpp:1479] Warning: destroy_process_group() was not called
slurmstepd: error: *** STEP 7.0 ON node CANCELLED AT 2026-01-01T00:00:00 ***
srun: error: node: task 0: Exited with exit code 1
"""
EARLIER = "job 8, restart 0\nValueError: of an earlier try\njob 9, restart 0\nanswering: 3 of 9\n"
TIMEOUT = (
    "probes: told earlier\nslurmstepd: error: *** JOB 8 ON node CANCELLED DUE TO TIME LIMIT ***\n"
)
STUDY = "job 9, restart 0\n[5/9] x\njob 9, restart 2\n[3/7] y, about 4 min left\n    y: 1 of 2, about 3 min left\n"


@pytest.fixture
def status(tmp_path, monkeypatch, capsys):
    """Return a function that writes logs and a queue, and returns the rows of the command by model and step."""
    runs = tmp_path / "runs"
    (runs / "logs").mkdir(parents=True)
    squeue = tmp_path / "squeue"

    def ask(queue: list[str] | None = None, **logs: str) -> dict[str, dict]:
        if queue is not None:
            lines = "\n".join(queue)
            squeue.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
            squeue.chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        for name, text in logs.items():
            (runs / "logs" / f"{name}.log").write_text(text)
        llava_bidir.cli.main(["status", str(runs), "--json"])
        rows = json.loads(capsys.readouterr().out)
        return {f"{row['model']}/{row['step']}": row for row in rows}

    return ask


def test_states_of_jobs_are_those_of_queue_results_and_logs(status, tmp_path):
    (tmp_path / "runs/a-causal/stage1/hf").mkdir(parents=True)
    (tmp_path / "runs/c/steps").mkdir(parents=True)
    (tmp_path / "runs/c/steps/causal.trained.json").write_text("{}")
    queue = [
        f"PENDING|Dependency|{tmp_path}|runs/a-causal/stage2",
        f"PENDING|BeginTime|/elsewhere|{tmp_path}/runs/a-causal/study",
        f"RUNNING|None|{tmp_path}|runs/b-causal/stage2",
        *[f"PENDING|Dependency|{tmp_path}|runs/b-causal/stage{i}" for i in (1, 2)],
        f"RUNNING|None|{tmp_path}|runs/b-causal/stage1",
        f"RUNNING|None|{tmp_path}|other/d-causal/stage1",
    ]
    finished = "job 3, restart 0\n[1/1] z\ndone\n"
    logs = {"c-causal-stage1": KILLED, "c-causal-vqa": TIMEOUT, "c-causal-study": finished}
    logs["d-causal-vqa"] = EARLIER
    rows = status(queue, **{"a-causal-study": STUDY}, **logs)
    states = {name: (row["state"], row["reason"]) for name, row in rows.items()}
    assert states == {
        "a-causal/stage1": ("done", ""),
        "a-causal/stage2": ("waiting", "Dependency"),
        "a-causal/study": ("waiting", "BeginTime"),
        "b-causal/stage1": ("running", ""),
        "b-causal/stage2": ("running", ""),
        "c/report": ("waiting", "not in the queue"),
        "c-causal/stage1": (
            "failed",
            "ended without a result; torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        ),
        "c-causal/study": ("done", ""),
        "c-causal/vqa": (
            "failed",
            "ended without a result; slurmstepd: error: *** JOB 8 ON node CANCELLED DUE TO TIME LIMIT ***",
        ),
        "d-causal/vqa": ("failed", "ended without a result; answering: 3 of 9"),
    }
    study = rows["a-causal/study"]
    assert [study[key] for key in ("done", "of", "left_s", "requeues")] == [2, 7, 180.0, 2]
    finished = rows["c-causal/study"]
    assert (finished["done"], finished["left_s"]) == (1, 0), "its last step has ended, too"


def test_a_run_without_progress_has_failed_once_it_has_a_config(status, tmp_path):
    for name in ("old-causal/stage1", "new-causal/stage1"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs/old-causal/stage1/config.yaml").touch()
    rows = status(**{"empty-causal-stage1": ""})
    states = {name: row["state"] for name, row in rows.items() if name.endswith("stage1")}
    expected = {"old-causal": "failed", "new-causal": "waiting", "empty-causal": "failed"}
    assert states == {f"{model}/stage1": state for model, state in expected.items()}


def test_progress_of_a_later_version_is_read(status, tmp_path):
    folder = tmp_path / "runs/a-causal/stage1"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text('{"done": 3, "of": 9, "gpu_temperature": 70}')
    row = status()["a-causal/stage1"]
    assert (row["done"], row["of"]) == (3, 9)


def test_a_study_is_no_report_of_models_whose_names_begin_with_its_own(status, tmp_path):
    for name in ("clip", "clip-v1-big"):
        (tmp_path / "runs" / name / "steps").mkdir(parents=True)
    rows = status(**{"clip-v1-big-causal-study": STUDY})
    assert {*rows} == {"clip/study", "clip-v1-big/report", "clip-v1-big-causal/study"}


def test_a_reason_has_no_bytes_that_a_terminal_obeys(status):
    rows = status(**{"a-causal-stage1": "ValueError: \x1b[31m\0no\x1b]0;title\a photo\n"})
    reason = rows["a-causal/stage1"]["reason"]
    assert reason == "ended without a result; ValueError: [31mno]0;title photo"


def test_without_slurm_a_locked_folder_is_running_and_a_dead_one_has_failed(status, tmp_path):
    (tmp_path / "runs/own/steps").mkdir(parents=True)
    (tmp_path / "runs/own/steps/trained.json").write_text("{}")
    with inside(exclusive_run_lock(tmp_path / "runs/own", "own")):
        assert status()["own/study"]["state"] == "running"
    row = status()["own/study"]
    assert (row["state"], row["done"]) == ("failed", 1)
    assert row["reason"] == "ended without a result"


def test_a_training_says_how_far_it_is(parts, conversations, status, tmp_path, monkeypatch):
    """Its state is asked for after each step, from inside."""
    rows = []
    monkeypatch.setattr(
        "llava_bidir.training.throughput.Throughput.on_train_batch_end",
        lambda *_: rows.append(status()["m/stage1"]),
    )
    run = tmp_path / "runs/m/stage1"
    more = "--trainer.log_every_n_steps 1 --data.micro_batch_size 4"
    tiny_models.fit(parts, conversations, run, *more.split())
    rows.append(status()["m/stage1"])
    states = [(row["state"], row["done"], row["of"]) for row in rows]
    assert states == [*(("running", step, 3) for step in (1, 2, 3)), ("done", 3, 3)]
    assert rows[-1]["left_s"] == 0 and rows[-1]["loss"] > 0


def test_people_read_all_that_is_known_of_a_step():
    progress = {"done": 3120, "of": 5197, "loss": 0.9123, "samples_per_s": 310.4, "left_s": 13_680}
    row = StepStatus(
        **progress, model="m", step="stage2", state="running", requeues=1, reason="why"
    )
    told = ["3,120 of 5,197", "loss 0.912", "310 samples/s", "3.8 h left", "requeues: 1", "why"]
    assert [*describe(row)] == told


def test_rows_are_printed_and_a_folder_without_runs_is_refused(tmp_path, capsys):
    for model in ("a", "longer"):
        Path(tmp_path, model, "stage1/hf").mkdir(parents=True)
    llava_bidir.cli.main(["status", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "step", "state", "progress"]
    assert lines[3].split() == ["longer", "stage1", "done"]
    with pytest.raises(SystemExit, match="has no runs; expected MODEL/stage1"):
        llava_bidir.cli.main(["status", str(tmp_path / "a")])
