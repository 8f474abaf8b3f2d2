"""Signals in a training of one process: what is saved, and what is said. tests/slurm has those of a cluster."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_models
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir.common.checkpoints import INTERRUPTED, Checkpoints
from llava_bidir.training.cli import build_cli
from llava_bidir.training.module import LlavaTraining

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
UNDER_SRUN = {
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
# two epochs of three steps of two micro-batches
OPTIONS = "--data.micro_batch_size 2 --data.val_annotations null --trainer.max_epochs 2"


@pytest.fixture(autouse=True)
def handlers():
    """Begin with the default handlers, whatever other tests have set, and restore those after a test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """Return the file to which a fake scontrol writes its arguments; the run is a job of Slurm."""
    script = tmp_path / "bin/scontrol"
    calls = tmp_path / "calls"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    for name, value in {**UNDER_SRUN, "SLURM_JOB_ID": "77"}.items():
        monkeypatch.setenv(name, value)
    return calls


@pytest.fixture
def fit(
    parts,
    conversations,
    tmp_path,
    monkeypatch,
    capsys,
):
    """Run `llava-bidir fit` with a signal in some micro-batch; return status, errors and losses."""

    def run(
        *more: str,
        number: int = signal.SIGINT,
        micro_batch: int = -1,
        out: str = "run",
    ) -> tuple[int, str, list[float]]:
        step = LlavaTraining.training_step
        losses = []

        def interrupted_step(module, batch, batch_idx):
            if len(losses) == micro_batch:
                os.kill(os.getpid(), number)
            loss = step(module, batch, batch_idx)
            losses.append(loss.item())
            return loss

        words = [*OPTIONS.split(), "--trainer.log_every_n_steps", "1", *more]
        with monkeypatch.context() as patch:
            patch.setattr(LlavaTraining, "training_step", interrupted_step)
            try:
                tiny_models.fit(parts, conversations, tmp_path / out, *words)
            except SystemExit as stop:
                return stop.code, capsys.readouterr().err, losses
        return 0, capsys.readouterr().err, losses

    return run


def saved_step(run: Path) -> int:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]


def logged(run: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    """Return step and value of each point in TensorBoard."""
    return [(x.step, x.value) for x in EventAccumulator(str(run)).Reload().Scalars(tag)]


@pytest.mark.parametrize(("number", "micro_batch"), zip(SIGNALS, (9, 2, 2), strict=True))
def test_a_signal_is_heeded_after_its_step_and_the_rest_equals_an_undisturbed_run(
    number,
    micro_batch,
    fit,
    scontrol,
    tmp_path,
):
    _, _, undisturbed = fit(out="undisturbed")
    status, told, losses = fit(number=number, micro_batch=micro_batch)
    step = micro_batch // 2 + 1
    assert saved_step(tmp_path / "run") == step
    assert len(losses) == 2 * step
    assert not (tmp_path / "run/hf").exists(), "the run is not finished"
    if number == signal.SIGINT:
        advice = "run the same command again with `--ckpt_path last` to go on"
        assert told.splitlines()[-1] == f"llava-bidir: interrupted; {advice}"
        assert status == 130
    else:
        assert status == INTERRUPTED
    # Slurm itself requeues a preempted job; a cancelled one must not return
    assert scontrol.exists() == (number == signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new process
    status, _, rest = fit("--ckpt_path", "last")
    assert status == 0
    assert losses + rest == undisturbed
    for tag in ("train/loss", "train/grad_norm", "lr-AdamW/adapter"):
        points = logged(tmp_path / "run", tag)
        assert points == logged(tmp_path / "undisturbed", tag)
        assert [step for step, _ in points] == [0, 1, 2, 3, 4, 5], tag
    weights = [
        (tmp_path / out / "hf/model.safetensors").read_bytes() for out in ("run", "undisturbed")
    ]
    assert weights[0] == weights[1]


def test_a_job_is_requeued(fit, scontrol):
    fit(number=signal.SIGUSR1, micro_batch=0)
    assert scontrol.read_text() == "requeue 77\n"


def test_a_signal_in_the_last_step_does_not_stop_the_run(fit, scontrol, tmp_path):
    status, _, _ = fit(number=signal.SIGUSR1, micro_batch=11)
    assert status == 0
    assert json.loads((tmp_path / "run/hf/training.json").read_text())["steps"] == 6
    assert not scontrol.exists()
    # at exit, Python restores the default handler, which kills, of signals that are not ignored
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_at_the_end_of_an_epoch_waits_for_the_next_step(fit, tmp_path):
    """A checkpoint after the last batch would count the epoch as finished in one place and not in another."""
    status, _, losses = fit(number=signal.SIGTERM, micro_batch=5)
    assert status == INTERRUPTED
    assert saved_step(tmp_path / "run") == 4
    assert len(losses) == 8


def test_ctrl_c_twice_ends_the_run_at_once(fit, tmp_path, monkeypatch):
    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LlavaTraining, "on_train_batch_start", interrupt)
    status, told, losses = fit()
    assert (status, losses) == (130, [])
    assert "nothing was saved yet: the same command starts anew" in told


def test_a_run_outside_of_the_main_thread_ends_as_usual(parts, conversations, tmp_path):
    """Only the main thread may set what a signal does; the run raised a ValueError after its last step."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(tiny_models.fit, parts, conversations, tmp_path / "run").result()
    assert (run / "hf/training.json").is_file()


@pytest.mark.parametrize("environment", [{}, UNDER_SRUN])
def test_requeueing_is_on_under_srun_only(
    environment,
    parts,
    conversations,
    tmp_path,
    monkeypatch,
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [*tiny_models.training_arguments(parts, conversations), "--out", str(tmp_path)]
    trainer = build_cli(words, run=False).trainer
    (checkpoints,) = (x for x in trainer.callbacks if isinstance(x, Checkpoints))
    assert trainer.callbacks[-1] is checkpoints, "after all callbacks that count batches"
    assert checkpoints.on_slurm == bool(environment)
    if environment:
        environment = trainer._accelerator_connector.cluster_environment
        assert isinstance(environment, SLURMEnvironment)
        assert not environment.auto_requeue
