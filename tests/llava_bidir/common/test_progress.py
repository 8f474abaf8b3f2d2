"""Lines of progress: the time left until the nearest limit, which may be days away."""

from datetime import timedelta
from types import SimpleNamespace

from llava_bidir.common import progress


def trainer_at(
    batches_done: int,
    epochs: int,
    steps: int,
    accumulated: int = 2,
    batches: int = 512,
):
    """A trainer after so many batches of its first epoch."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=batches_done))
    return SimpleNamespace(
        fit_loop=loop,
        num_training_batches=batches,
        accumulate_grad_batches=accumulated,
        max_epochs=epochs,
        max_steps=steps,
        global_step=batches_done // accumulated,
        current_epoch=0,
        is_global_zero=True,
        callback_metrics={},
    )


def lines_of(
    callback,
    trainers,
    monkeypatch,
    caplog,
) -> list[str]:
    """The lines that a callback logs after each batch, each of which takes 200 s."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO"):
        callback.on_train_start(trainer_at(0, -1, -1), None)
        for i, trainer in enumerate(trainers):
            now[0] += 200
            callback.on_train_batch_end(trainer, None, {"loss": 1.0}, None, i)
    return caplog.messages


def test_time_left_counts_the_batches_within_a_step(monkeypatch, caplog):
    """It stood still, or grew, until the step was done: 1:19:38, 1:19:58, 1:20:27, 1:22:35."""
    trainers = [trainer_at(done, 1, 3, accumulated=8) for done in range(1, 25)]
    lines = lines_of(progress.LogProgress(), trainers, monkeypatch, caplog)
    left = [line.rpartition(", ")[2].removesuffix(" left") for line in lines]
    assert left == [str(timedelta(seconds=200 * (24 - done))) for done in range(1, 25)]
    assert lines[0].startswith("step 0 of 3, epoch 1/1, batch 1/512")
    assert lines[-1].startswith("step 3 of 3, epoch 1/1, batch 24/512")


def test_a_last_step_that_is_shorter_is_not_begun_after_the_epoch():
    """Five batches are three steps of two; the epoch ends with a step of one."""
    trainer = trainer_at(5, -1, 6, batches=5)
    trainer.global_step = 3
    assert progress.batches_left(trainer, 4) == 6
    assert progress.total_steps(trainer_at(5, 2, -1, batches=5)) == 6
    assert progress.total_steps(trainer_at(5, -1, -1)) is None
