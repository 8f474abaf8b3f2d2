"""Lines of progress: the time left until the end of the run."""

from types import SimpleNamespace

from llava_bidir.common import lightning_cli


def test_time_left_is_that_of_the_steps_to_come(monkeypatch, caplog):
    """A step of 200 s; the run was resumed after the second of eight steps, which end before its epochs do."""
    loop = SimpleNamespace(_should_accumulate=lambda: False, _is_training_done=False)
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=loop),
        datamodule=SimpleNamespace(steps_per_epoch=5),
        max_epochs=2,
        max_steps=8,
        global_step=2,
        current_epoch=0,
        is_global_zero=True,
        callback_metrics={},
    )
    now = [0.0]
    monkeypatch.setattr(lightning_cli.time, "monotonic", lambda: now[0])
    progress = lightning_cli.LogProgress()
    with caplog.at_level("INFO"):
        progress.on_train_start(trainer, None)
        for step in range(3, 9):
            now[0] += 200
            trainer.global_step = step
            progress.on_train_batch_end(trainer, None, {"loss": 1.0})
    assert [line.rpartition(", ")[2] for line in caplog.messages] == [
        "0:16:40 left",
        "0:13:20 left",
        "0:10:00 left",
        "0:06:40 left",
        "0:03:20 left",
        "0:00:00 left",
    ]
    assert caplog.messages[0].startswith("step 3 of 8, epoch 1, loss 1, 0.005 steps/s")
