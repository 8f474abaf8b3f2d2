"""Ctrl-C in a training: what is saved, and what is said."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir.cli import main
from llava_bidir.training.module import LlavaTraining


@pytest.fixture(autouse=True)
def handler():
    """Restore the handler of Ctrl-C after a test; Lightning ignores it once it has ended a run."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fit(
    parts,
    conversations,
    tmp_path,
    monkeypatch,
    capsys,
):
    """Run `llava-bidir fit` with Ctrl-C in some micro-batches; two of them are a step, six of them an epoch."""

    def run(*more: str, interrupts: dict[int, int] | None = None) -> tuple[int, str]:
        step = LlavaTraining.training_step
        count = [0]

        def interrupted_step(module, batch, batch_idx):
            for _ in range((interrupts or {}).get(count[0], 0)):
                os.kill(os.getpid(), signal.SIGINT)
            count[0] += 1
            return step(module, batch, batch_idx)

        words = "--data.micro_batch_size 2 --data.val_annotations null".split()
        with monkeypatch.context() as patch:
            patch.setattr(LlavaTraining, "training_step", interrupted_step)
            try:
                tiny_models.fit(parts, conversations, tmp_path / "run", *words, *more)
            except SystemExit as stop:
                return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def test_ctrl_c_saves_after_the_step_and_the_run_goes_on_from_there(fit, tmp_path):
    """It said "run the same command again with --ckpt_path last", and there was no checkpoint."""
    status, told = fit(interrupts={2: 1})
    last = tmp_path / "run/checkpoints/last.ckpt"
    advice = f"run the same command again with `--ckpt_path last` to go on from {last}"
    assert status == 130
    assert told.splitlines()[-1] == f"llava-bidir: interrupted; {advice}"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert fit("--ckpt_path", "last")[0] == 0
    assert json.loads((tmp_path / "run/hf/training.json").read_text())["steps"] == 3


def test_a_callbacks_own_last_ckpt_replaces_the_interrupted_one(fit, tmp_path):
    """Lightning wrote last-v1.ckpt beside it."""
    own = [
        "--trainer.callbacks",
        '[{"class_path": "ModelCheckpoint", "init_args": {"save_last": true}}]',
    ]
    fit(*own, interrupts={2: 1})
    fit(*own, "--ckpt_path", "last")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["epoch=0-step=3.ckpt", "last.ckpt"]
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3


def test_export_takes_the_newest_checkpoint_of_a_run_and_says_which(fit, tmp_path, caplog):
    fit(interrupts={2: 1})
    run = tmp_path / "run"
    old = shutil.copy(run / "checkpoints/last.ckpt", tmp_path)
    fit("--ckpt_path", "last")
    newest = run / "checkpoints/epoch=0-step=3.ckpt"
    with caplog.at_level("INFO"):
        main(["export", str(run), str(tmp_path / "hf")])
    assert f"exporting {newest}, which is after step 3" in caplog.text
    exported = json.loads((tmp_path / "hf/training.json").read_text())
    assert exported["checkpoint"] == str(newest)
    assert exported["steps"] == 3
    shutil.copy2(old, run / "checkpoints/old.ckpt")
    os.utime(run / "checkpoints/old.ckpt", ns=(0, 0))
    main(["export", str(run / "checkpoints/old.ckpt"), str(tmp_path / "old")])
    assert (
        f"old.ckpt is not the newest checkpoint of its run, which is {newest.name}" in caplog.text
    )
    assert json.loads((tmp_path / "old/training.json").read_text())["steps"] == 2


def test_a_run_outside_of_the_main_thread_ends_as_usual(parts, conversations, tmp_path):
    """Only the main thread may set what a signal does; the run raised a ValueError after its last step."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(tiny_models.fit, parts, conversations, tmp_path / "run").result()
    assert (run / "hf/training.json").is_file()


def test_each_step_is_logged_once_across_an_interrupt(fit, tmp_path):
    """With losses, and with learning rates, of which each of a step's micro-batches had a point."""
    fit("--trainer.log_every_n_steps", "1", interrupts={2: 1})
    fit("--trainer.log_every_n_steps", "1", "--ckpt_path", "last")
    logged = EventAccumulator(str(tmp_path / "run")).Reload()
    rates = [tag for tag in logged.Tags()["scalars"] if tag.startswith("lr-")]
    assert rates
    for tag in ("train/loss", "train/grad_norm", *rates):
        assert [event.step for event in logged.Scalars(tag)] == [0, 1, 2], tag
