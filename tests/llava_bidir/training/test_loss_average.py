"""Both averages of a step's loss, against a loop over samples."""

import subprocess
import sys
from pathlib import Path

import ddp_gradients
import pytest
import torch
import torch.nn.functional as F
from ddp_gradients import GLOBAL_BATCH, fit_one_step
from processes import HANGING_S
from tolerances import rounding

from llava_bidir.data.token_weighted_loader import StepLoader

pytestmark = pytest.mark.numerics


def assert_same_gradients(ours: dict, expected: dict) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        near = rounding(expected[name], 2 * 7)  # layers from the pixels to the logits and back
        torch.testing.assert_close(
            gradient, expected[name], **near, msg=lambda m, n=name: f"{n}: {m}"
        )


def summed_losses(model, batches) -> tuple[list, list[int]]:
    """Return the summed loss and the supervised tokens of each sample alone, without padding."""
    sums, counts = [], []
    for batch in batches:
        images = iter(batch["pixel_values"] if batch["pixel_values"] is not None else [])
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        ):
            n = int(mask.sum())
            pixels = next(images)[None] if model.config.image_token_id in ids else None
            logits = model(input_ids=ids[None, :n], pixel_values=pixels).logits[0, :-1]
            sums.append(F.cross_entropy(logits, labels[1:n], ignore_index=-100, reduction="sum"))
            counts.append(int((labels[1:n] != -100).sum()))
    return sums, counts


def gradients_of(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad
        for n, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("micro", [8, 2, 1])
def test_tokens_is_the_mean_over_the_whole_global_batch(micro, parts, conversations):
    step = fit_one_step(parts, conversations, "tokens", micro)
    sums, counts = summed_losses(step["model"], step["batches"])
    assert (
        len(counts) == GLOBAL_BATCH
        and len(set(counts)) > 2
        and len(step["batches"]) == GLOBAL_BATCH // micro
    )
    assert_same_gradients(step["gradients"], gradients_of(step["model"], sum(sums) / sum(counts)))


@pytest.mark.parametrize("micro", [8, 2])
def test_llava_is_the_mean_of_the_micro_batches_means(micro, parts, conversations):
    step = fit_one_step(parts, conversations, "llava", micro)
    sums, counts = summed_losses(step["model"], step["batches"])
    cuts = range(0, GLOBAL_BATCH, micro)
    means = [sum(sums[i : i + micro]) / sum(counts[i : i + micro]) for i in cuts]
    assert_same_gradients(step["gradients"], gradients_of(step["model"], sum(means) / len(means)))


@pytest.mark.distributed
def test_two_processes_have_the_gradients_of_one(parts, conversations, tmp_path):
    """Of `tokens`; test_deepspeed_strategy.py trains with `llava`."""
    encoder, llm = parts
    script, out = Path(ddp_gradients.__file__), tmp_path / "gradients.pt"
    arguments = [encoder.path, llm, str(conversations), "tokens", "2", "2", str(out)]
    run = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=HANGING_S
    )
    assert run.returncode == 0, run.stderr[-3000:]
    single = fit_one_step(parts, conversations, "tokens", 2)["gradients"]
    assert_same_gradients(torch.load(out), single)


def test_weights_of_a_step_average_to_one_and_none_is_lost():
    counts = [3, 0, 5, 0, 0, 0, 7, 1]

    def batches(step_batches, mean_over_ranks=lambda mean: mean):
        loader = StepLoader(
            counts,
            batch_size=1,
            collate_fn=lambda x: {"supervised": x[0]},
            step_batches=step_batches,
            mean_over_ranks=mean_over_ranks,
        )
        assert len(loader) == len(counts)
        return list(loader)

    assert [batch["supervised"] for batch in batches(2)] == counts
    assert [float(batch["weight"]) for batch in batches(2)] == [2, 0, 2, 0, 0, 0, 1.75, 0.25]
    assert [float(batch["weight"]) for batch in batches(4)] == [1.5, 0, 2.5, 0, 0, 0, 3.5, 0.5]
    beside_an_idle_rank = batches(1, lambda mean: mean / 2)
    assert [float(batch["weight"]) for batch in beside_an_idle_rank] == [2, 0, 2, 0, 0, 0, 2, 2]
