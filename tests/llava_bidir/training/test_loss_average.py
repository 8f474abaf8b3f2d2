"""Both averages of a step's loss, against a loop over samples (test_deepspeed_strategy.py: on two processes)."""

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from lightning import Trainer
from tolerances import rounding

from llava_bidir.data.batch_samplers import StepLoader
from llava_bidir.data.datamodule import InstructionData
from llava_bidir.model.build import build_processor
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


def fit_one_step(
    parts,
    folder,
    loss_average: str,
    micro_batch_size: int,
) -> Recorded:
    torch.manual_seed(0)
    module = Recorded(*parts, ["adapter", "llm"], loss_average=loss_average, learning_rate=0.0)
    data = InstructionData(
        str(folder / "data.json"),
        str(folder),
        batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch_size,
        num_workers=0,
        processor=build_processor(*parts),
        image_tokens=tiny_models.TOKENS,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return module


def summed_losses(model, batches) -> tuple[list[torch.Tensor], list[int]]:
    """Return the summed loss and the supervised tokens of each sample alone, without padding."""
    sums = []
    counts = []
    for batch in batches:
        images = iter(batch["pixel_values"])
        rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        for ids, labels, mask in rows:
            n = int(mask.sum())
            pixels = next(images)[None] if model.config.image_token_id in ids else None
            logits = model(input_ids=ids[None, :n], pixel_values=pixels).logits[0, :-1]
            loss = F.cross_entropy(logits, labels[1:n], ignore_index=-100, reduction="sum")
            sums.append(loss)
            counts.append(int((labels[1:n] != -100).sum()))
    return sums, counts


@pytest.mark.parametrize(
    ("loss_average", "micro"), [("tokens", 8), ("tokens", 2), ("llava", 8), ("llava", 2)]
)
def test_gradients_of_a_step_are_those_of_the_average(
    loss_average,
    micro,
    parts,
    conversations,
):
    """`tokens` averages over the whole global batch, `llava` over the means of the micro-batches."""
    step = fit_one_step(parts, conversations, loss_average, micro)
    sums, counts = summed_losses(step.model, step.batches)
    assert len(counts) == GLOBAL_BATCH
    assert len(set(counts)) > 2
    assert len(step.batches) == GLOBAL_BATCH // micro
    size = GLOBAL_BATCH if loss_average == "tokens" else micro
    cuts = range(0, GLOBAL_BATCH, size)
    means = [sum(sums[i : i + size]) / sum(counts[i : i + size]) for i in cuts]
    step.model.zero_grad()
    (sum(means) / len(means)).backward()
    expected = gradients(step.model)
    assert step.gradients.keys() == expected.keys()
    for name, gradient in step.gradients.items():
        near = rounding(expected[name], 2 * 7)  # layers from the pixels to the logits and back
        torch.testing.assert_close(gradient, expected[name], **near)


def test_weights_of_a_step_average_to_one_and_none_is_lost():
    counts = [3, 0, 5, 0, 0, 0, 7, 1]

    def weights(step_batches, mean_over_ranks=lambda mean: mean) -> list[float]:
        loader = StepLoader(
            counts,
            batch_size=1,
            collate_fn=lambda x: {"supervised": x[0]},
            step_batches=step_batches,
            mean_over_ranks=mean_over_ranks,
        )
        batches = list(loader)
        assert len(loader) == len(counts)
        assert [batch["supervised"] for batch in batches] == counts
        return [float(batch["weight"]) for batch in batches]

    assert weights(2) == [2, 0, 2, 0, 0, 0, 1.75, 0.25]
    assert weights(4) == [1.5, 0, 2.5, 0, 0, 0, 3.5, 0.5]
    beside_an_idle_rank = weights(1, lambda mean: mean / 2)
    assert beside_an_idle_rank == [2, 0, 2, 0, 0, 0, 2, 2]
