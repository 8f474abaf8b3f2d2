"""Requeueing, with signals of the test itself and a fake `scontrol` (tests/slurm has real ones)."""

import os
import signal
from pathlib import Path

import pytest
import tiny_models
import torch
from lightning import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir.common.checkpoints import INTERRUPTED, SaveOnSignal
from llava_bidir.training.cli import build_cli

UNDER_SRUN = {
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def handlers():
    """Begin with the default handlers, whatever other tests have set, and restore those after a test."""
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """Return the file to which a fake scontrol writes its arguments."""
    script = tmp_path / "bin/scontrol"
    calls = tmp_path / "calls"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return calls


class SignalAt(Callback):
    """Sends a signal to this process in a micro-batch, counted over epochs from 0."""

    def __init__(self, number: int, micro_batch: int):
        self.number = number
        self.micro_batch = micro_batch
        self.losses = []

    def on_train_batch_start(
        self,
        trainer,
        pl_module,
        batch,
        batch_idx,
    ):
        if len(self.losses) == self.micro_batch:
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(
        self,
        trainer,
        pl_module,
        outputs,
        batch,
        batch_idx,
    ):
        self.losses.append(outputs["loss"].item())


def arguments(parts, conversations, out) -> list[str]:
    """Two epochs of three optimizer steps, two micro-batches each."""
    more = "--data.micro_batch_size 2 --data.val_annotations null --trainer.max_epochs 2 --trainer.log_every_n_steps 1"
    return [*tiny_models.training_arguments(parts, conversations), *more.split(), "--out", str(out)]


def fit(
    parts,
    conversations,
    out,
    number=signal.SIGUSR1,
    micro_batch=None,
    ckpt_path=None,
):
    """Return the losses, the trainer, and the exit status, 0 for a finished run."""
    cli = build_cli(arguments(parts, conversations, out), run=False)
    sender = SignalAt(number, micro_batch)
    cli.trainer.callbacks[:0] = [sender]
    cli.trainer.callbacks[-1] = SaveOnSignal(on_slurm=True)
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    except SystemExit as stop:
        return sender.losses, cli.trainer, stop.code
    return sender.losses, cli.trainer, 0


@pytest.fixture(scope="module")
def uninterrupted(parts, conversations, tmp_path_factory) -> tuple[list[float], Path]:
    """The losses and the folder of a run without signals."""
    folder = tmp_path_factory.mktemp("whole")
    return fit(parts, conversations, folder)[0], folder


def logged(folder) -> list[tuple[int, float]]:
    """Return step and loss of each point in TensorBoard."""
    points = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    return [(point.step, point.value) for point in points]


@pytest.mark.parametrize(("micro_batch", "step"), [(2, 2), (9, 5)])
def test_a_signal_is_heeded_at_the_next_step_and_the_rest_equals_an_uninterrupted_run(
    micro_batch,
    step,
    uninterrupted,
    parts,
    conversations,
    scontrol,
    tmp_path,
):
    whole, folder = uninterrupted
    losses, trainer, status = fit(parts, conversations, tmp_path / "cut", micro_batch=micro_batch)
    assert status == INTERRUPTED
    assert trainer.global_step == step
    assert len(losses) == 2 * step
    assert scontrol.read_text() == "requeue 77\n"
    assert not (tmp_path / "cut/hf").exists(), "the run is not finished"
    last = tmp_path / "cut/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == step
    rest, _, status = fit(parts, conversations, tmp_path / "cut", ckpt_path=last)
    assert status == 0
    assert losses + rest == whole
    assert len(whole) == 12
    assert logged(tmp_path / "cut") == logged(folder)
    assert [step for step, _ in logged(folder)] == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "cut/hf/model.safetensors").read_bytes() == (
        folder / "hf/model.safetensors"
    ).read_bytes()


def test_sigterm_saves_but_does_not_requeue(
    parts,
    conversations,
    scontrol,
    tmp_path,
):
    """Slurm itself requeues a preempted job; a cancelled one must not return."""
    _, trainer, status = fit(parts, conversations, tmp_path, signal.SIGTERM, micro_batch=3)
    assert status == INTERRUPTED
    assert trainer.global_step == 2
    assert (tmp_path / "checkpoints/last.ckpt").is_file()
    assert not scontrol.exists()


def test_signal_in_the_last_step_does_not_stop_the_run(
    parts,
    conversations,
    scontrol,
    tmp_path,
):
    _, trainer, status = fit(parts, conversations, tmp_path, micro_batch=11)
    assert status == 0
    assert trainer.global_step == 6
    assert (tmp_path / "hf").is_dir()
    assert not scontrol.exists()
    # at exit, Python restores the default handler, which kills, of signals that are not ignored
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_at_the_end_of_an_epoch_waits_for_the_next(
    parts,
    conversations,
    scontrol,
    tmp_path,
):
    """A checkpoint after the last batch would count the epoch as finished in one place and not in another."""
    _, trainer, status = fit(parts, conversations, tmp_path, micro_batch=5)
    assert status == INTERRUPTED
    assert trainer.global_step == 4
    assert trainer.current_epoch == 1


def test_requeueing_is_on_under_srun_only(
    parts,
    conversations,
    tmp_path,
    monkeypatch,
):
    off = build_cli(arguments(parts, conversations, tmp_path), run=False).trainer
    assert isinstance(off.callbacks[-1], SaveOnSignal)
    assert not off.callbacks[-1].on_slurm
    for name, value in UNDER_SRUN.items():
        monkeypatch.setenv(name, value)
    on = build_cli(arguments(parts, conversations, tmp_path), run=False).trainer
    assert isinstance(on.callbacks[-1], SaveOnSignal), "after all callbacks that count batches"
    assert on.callbacks[-1].on_slurm
    environment = on._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
