"""Signals in a training of one process: what is saved, and what is said. tests/slurm has those of a cluster."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_models
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from run_bytes import assert_same_export
from training_runs import points

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
OPTIONS += " --trainer.log_every_n_steps 1"


@pytest.fixture(autouse=True)
def handlers():
    """Begin with the default handlers, whatever other tests have set, and restore those after a test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    set_default_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def set_default_handlers() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)


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


@pytest.fixture(scope="module")
def undisturbed(parts, conversations, tmp_path_factory) -> Path:
    """The folder of a run without a signal."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return tiny_models.fit(parts, conversations, out, *OPTIONS.split())


@pytest.fixture
def fit(parts, conversations, tmp_path, monkeypatch, capsys):
    """Run `llava-bidir fit` with a signal in some micro-batch; return status, errors and trained micro-batches."""

    def run(*more: str, number: int = signal.SIGINT, micro_batch: int = -1) -> tuple[int, str, int]:
        step = LlavaTraining.training_step
        trained = []

        def interrupted_step(module, batch, batch_idx):
            if len(trained) == micro_batch:
                os.kill(os.getpid(), number)
            trained.append(batch["ids"])
            return step(module, batch, batch_idx)

        status = 0
        with monkeypatch.context() as patch:
            patch.setattr(LlavaTraining, "training_step", interrupted_step)
            try:
                tiny_models.fit(parts, conversations, tmp_path / "run", *OPTIONS.split(), *more)
            except SystemExit as stop:
                status = stop.code
        return status, capsys.readouterr().err, len(trained)

    return run


def saved_step(run: Path) -> int:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("number", "micro_batch"),
    [(signal.SIGINT, 2), (signal.SIGTERM, 9), (signal.SIGUSR1, 2)],
)
def test_a_signal_is_heeded_after_its_step_and_the_rest_equals_an_undisturbed_run(
    number, micro_batch, fit, scontrol, undisturbed, tmp_path
):
    status, told, trained = fit(number=number, micro_batch=micro_batch)
    run = tmp_path / "run"
    step = micro_batch // 2 + 1
    assert saved_step(run) == step
    assert trained == 2 * step
    assert not (run / "hf").exists(), "the run is not finished"
    if number == signal.SIGINT:
        advice = "run the same command again with `--ckpt_path last` to go on"
        assert told.splitlines()[-1] == f"llava-bidir: interrupted; {advice}"
        assert status == 130
    else:
        assert status == INTERRUPTED
    # Slurm itself requeues a preempted job; a cancelled one must not return
    is_requeued = number == signal.SIGUSR1
    assert (scontrol.read_text() if scontrol.exists() else "") == "requeue 77\n" * is_requeued
    set_default_handlers()  # as in a new process
    status, _, rest = fit("--ckpt_path", "last")
    assert (status, trained + rest) == (0, 12)
    for tag in ("train/loss", "train/grad_norm", "lr-AdamW/adapter"):
        assert points(run, tag) == points(undisturbed, tag)
        assert [step for step, _ in points(run, tag)] == [0, 1, 2, 3, 4, 5], tag
    assert_same_export(run / "hf", undisturbed / "hf")
    # at exit, Python restores the default handler, which kills, of signals that are not ignored
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("micro_batch", "ended"), [(5, (INTERRUPTED, 8, 4)), (11, (0, 12, 6))])
def test_a_signal_at_the_end_of_an_epoch_waits_for_the_next_step(micro_batch, ended, fit, tmp_path):
    """A checkpoint after the last batch would count the epoch as finished in one place and not in another."""
    status, _, trained = fit(number=signal.SIGTERM, micro_batch=micro_batch)
    assert (status, trained, saved_step(tmp_path / "run")) == ended


def test_ctrl_c_twice_ends_the_run_at_once(fit, monkeypatch):
    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LlavaTraining, "on_train_batch_start", interrupt)
    status, told, trained = fit()
    assert (status, trained) == (130, 0)
    assert "`--ckpt_path last` to go on" in told


def test_a_run_outside_of_the_main_thread_ends_as_usual(parts, conversations, tmp_path):
    """Only the main thread may set what a signal does; the run raised a ValueError after its last step."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(tiny_models.fit, parts, conversations, tmp_path / "run").result()
    assert (run / "hf/training.json").is_file()


@pytest.mark.parametrize("environment", [{}, UNDER_SRUN])
def test_requeueing_is_on_under_srun_only(environment, parts, conversations, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [*tiny_models.training_arguments(parts, conversations), "--out", str(tmp_path)]
    trainer = build_cli(words, run=False).trainer
    (checkpoints,) = (x for x in trainer.callbacks if isinstance(x, Checkpoints))
    assert trainer.callbacks[-1] is checkpoints, "after all callbacks that count batches"
    assert checkpoints.on_slurm == bool(environment)
    if environment:
        cluster = trainer._accelerator_connector.cluster_environment
        assert isinstance(cluster, SLURMEnvironment)
        assert not cluster.auto_requeue
