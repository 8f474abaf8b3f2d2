"""Lines of progress: the time left until the nearest limit, which may be days away."""

from types import SimpleNamespace

import pytest

from llava_bidir.common import progress


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((1, -1), "0.005 batches/s, 1 day, 4:23:20 left"),  # 511 batches
        (
            (1, 2),
            "0.005 batches/s, 0:06:40 left",
        ),  # a step of two batches ends before the epoch does
        ((-1, 1000), "step 1/1000, 4 days, 15:00:00 left"),  # 999 steps
    ],
)
def test_time_left_is_that_until_the_nearest_limit(limits, expected, monkeypatch, caplog):
    clock = iter([0.0, 200.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    batches = SimpleNamespace(total_batch_idx=0)
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=batches),
        num_training_batches=512,
        accumulate_grad_batches=2,
    )
    trainer.max_epochs, trainer.max_steps, trainer.global_step, trainer.current_epoch = (
        *limits,
        1,
        0,
    )
    trainer.is_global_zero = True
    lines = progress.LogProgress()
    with caplog.at_level("INFO"):
        lines.on_train_start(trainer, None)
        batches.total_batch_idx = 1
        lines.on_train_batch_end(trainer, None, {"loss": 1.0}, None, 0)
    assert caplog.messages[-1].endswith(expected)


def test_a_pass_logs_its_rate_and_the_time_left(monkeypatch, caplog):
    clock = iter([0.0, 20.0, 21.0, 30.0])  # a line at the first batch and at the last
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level("INFO"):
        assert list(progress.LogProgress().track("abc")) == ["a", "b", "c"]
    assert caplog.messages == [
        "batch 1/3 of a pass, 0.05 batches/s, 0:00:40 left",
        "batch 3/3 of a pass, 0.1 batches/s, 0:00:00 left",
    ]
