"""Both averages of a step's loss, against a loop over samples (test_strategies.py: on two processes)."""

import pytest
import torch
from tolerances import rounding
from training_runs import make_data, make_trainer

from llava_bidir.data.batch_samplers import StepLoader
from llava_bidir.training.module import LlavaTraining

pytestmark = pytest.mark.numerics

GLOBAL_BATCH = 8


class Recorded(LlavaTraining):
    """Keeps the micro-batches of a step and the gradients that the optimizer is given."""

    def training_step(self, batch, batch_idx):
        self.batches = [*getattr(self, "batches", []), batch]
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.gradients = gradients(self.model)
        super().on_before_optimizer_step(optimizer)


def gradients(model) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trained.items()
    }


@pytest.mark.parametrize(
    ("loss_average", "micro"), [("tokens", 8), ("tokens", 2), ("llava", 8), ("llava", 2)]
)
def test_gradients_of_a_step_are_those_of_the_average(
    loss_average, micro, parts, conversations, tmp_path
):
    """`tokens` averages over the whole global batch, `llava` over the means of the micro-batches."""
    torch.manual_seed(0)
    step = Recorded(*parts, ["adapter", "llm"], loss_average=loss_average, learning_rate=0.0)
    data = make_data(conversations, parts, batch_size=GLOBAL_BATCH, micro_batch_size=micro)
    make_trainer(tmp_path, max_steps=1).fit(step, datamodule=data)
    drawn = [int(name.removeprefix("r")) for batch in step.batches for name in batch["ids"]]
    alone = [data.collate([data.train[i]]) for i in drawn]  # as test_supervised_loss.py compares it
    counts = [batch["supervised"] for batch in alone]
    sums = [step.loss(batch) * batch["supervised"] for batch in alone]
    assert len(counts) == GLOBAL_BATCH
    assert len(set(counts)) > 2
    assert len(step.batches) == GLOBAL_BATCH // micro
    size = GLOBAL_BATCH if loss_average == "tokens" else micro
    cuts = range(0, GLOBAL_BATCH, size)
    means = [sum(sums[i : i + size]) / sum(counts[i : i + size]) for i in cuts]
    step.model.zero_grad()
    (sum(means) / len(means)).backward()
    for name, expected in gradients(step.model).items():
        near = rounding(expected, 2 * 7)  # layers from the pixels to the logits and back
        torch.testing.assert_close(step.gradients[name], expected, **near)


@pytest.mark.parametrize(
    ("step_batches", "share_of_others", "weights"),
    [
        (2, 1.0, [2, 0, 2, 0, 0, 0, 1.75, 0.25]),
        (4, 1.0, [1.5, 0, 2.5, 0, 0, 0, 3.5, 0.5]),
        (1, 0.5, [2, 0, 2, 0, 0, 0, 2, 2]),  # beside an idle rank
    ],
)
def test_weights_of_a_step_average_to_one_and_none_is_lost(step_batches, share_of_others, weights):
    counts = [3, 0, 5, 0, 0, 0, 7, 1]
    loader = StepLoader(
        counts,
        batch_size=1,
        collate_fn=lambda x: {"supervised": x[0]},
        step_batches=step_batches,
        mean_over_ranks=lambda mean: mean * share_of_others,
    )
    batches = list(loader)
    assert [batch["supervised"] for batch in batches] == counts
    assert [float(batch["weight"]) for batch in batches] == weights
