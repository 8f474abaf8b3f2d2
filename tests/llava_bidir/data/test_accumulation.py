"""Under DeepSpeed, an epoch that would end inside a step is refused before anything is trained."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from llava_bidir.common.errors import UserError
from llava_bidir.data.datamodule import InstructionData


def set_up(conversations, strategy: type, limit: int | float, micro_batch_size: int = 1) -> int:
    """Return the steps of an epoch of 12 conversations in global batches of 4."""
    data = InstructionData(
        str(conversations / "data.json"),
        str(conversations),
        batch_size=4,
        micro_batch_size=micro_batch_size,
    )
    data.trainer = SimpleNamespace(
        is_global_zero=True,
        global_rank=0,
        world_size=1,
        log_every_n_steps=1,
        accumulate_grad_batches=1,
        limit_train_batches=limit,
        strategy=strategy.__new__(strategy),
    )
    data.setup("fit")
    return data.steps_per_epoch


@pytest.mark.parametrize(
    ("limit", "trained"),
    [(10, 10), (0.5, 6), (3, 3), (0.01, 1)],
)
def test_zero_refuses_an_epoch_that_ends_inside_a_step(
    conversations,
    limit,
    trained,
):
    message = f"trainer.limit_train_batches {limit} ends an epoch inside a step, .* 4 micro-batches"
    with pytest.raises(UserError, match=message):
        set_up(conversations, DeepSpeedStrategy, limit)
    assert set_up(conversations, DDPStrategy, limit) == -(-trained // 4)


@pytest.mark.parametrize(
    ("limit", "micro_batch_size", "steps"),
    [
        (1.0, 1, 3),
        (8, 1, 2),
        (100, 1, 3),
        (2, 4, 2),
    ],
)
def test_zero_accepts_whole_steps(
    conversations,
    limit,
    micro_batch_size,
    steps,
):
    assert set_up(conversations, DeepSpeedStrategy, limit, micro_batch_size) == steps
