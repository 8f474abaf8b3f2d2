"""Starvation with dummy tokens before the image: do early patches lack context, or an attention sink?

Attention heads that find nothing relevant attend to a sink, mostly the first tokens. If early patches starve for lack
of a sink, tokens without any information about the image help them as much as other patches would. If they lack
context, such tokens change nothing.

The tokens repeat the prompt's last token. It is what the model has seen right before every image, so patch 0 follows
the token that it is used to, and no other kind of token enters. The frozen probes of both runs stay as they are,
although they have never read states after this prompt: a gain speaks for a sink, but a loss can be the probes'. With
--own-probe, the probes of by_position.py are therefore solved once more, on states of training images with the tokens.

The prompt itself, system prompt and BOS token included, is a sink already. A null result therefore says that more
tokens do not help, not that sinks do not matter.

Shapes: N images, T patches, R resamplings.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import interval
from llava_bidir.common.errors import UserError
from probes.models.sites import layer_site
from probes.results.probe_run import ProbeRun

from .patch_accuracy import CountsByMask, PatchCounts, accuracy_gap, count_run_patches, patch_accuracy, pooled_gap

if TYPE_CHECKING:  # a report needs no model
    from probes.models.frozen_mllm import FrozenMLLM


def dummy_token_results(
    runs: dict[str, ProbeRun], site: str, tokens: int, counts: CountsByMask, weights: Tensor
) -> dict:
    """Return "dummy_tokens" of starvation.json, from the counts without them and bootstrap weights f[R, N].

    Returns:
        {"tokens"; "causal", "bidirectional", "gap", "gap_ci95": by patch, with the tokens; "first_row": the same;
        "change": by mask {"patch_0", "first_row": {"value", "ci95"}}, accuracy with minus without the tokens}.
        `starvation` adds "by_position", see the docstring of the module.

    Raises:
        UserError: `tokens` is not positive, a prompt has no token to repeat, or the tokens do not reach the LLM.
    """
    if tokens < 1:
        raise UserError(f"--dummy-tokens must be at least 1, got {tokens}")
    read = {
        mask: count_run_patches(run, load_with_tokens(run, tokens), site, run.dataset(), "dummy tokens")
        for mask, run in runs.items()
    }
    columns = runs["causal"].metrics["grid"][1]
    return {
        "tokens": tokens,
        **accuracy_gap(*patch_accuracy(read, weights)),
        "first_row": pooled_gap(read, weights, range(columns)),
        "change": {mask: _change(counts[mask], read[mask], weights, columns) for mask in runs},
    }


def load_with_tokens(run: ProbeRun, tokens: int) -> "FrozenMLLM":
    """Load the model of a run, with dummy tokens before the image if `tokens` is not 0."""
    mllm = run.mllm()
    if tokens:
        add_dummy_tokens(mllm, tokens, mllm.preprocess([run.dataset()[0]["image"]]))
    return mllm


def add_dummy_tokens(mllm: "FrozenMLLM", tokens: int, pixels: Tensor) -> None:
    """Repeat the last token before the image, and check that patch 0 attends to all repetitions.

    Args:
        mllm: The model, changed in place.
        tokens: Number of repetitions to insert.
        pixels: f[1, 3, H, W], an image for the check.

    Raises:
        UserError: There is no token before the image, or patch 0 does not see the inserted ones.
    """
    before = mllm.prefix_ids[0].tolist()
    if not before:
        raise UserError("--dummy-tokens repeats the last token before the image, but this model has none")
    states = mllm.states(pixels, [layer_site(1)])[layer_site(1)]
    mllm.set_prefix(before + before[-1:] * tokens)
    first_image_token = int(mllm.is_image.nonzero()[0])
    changed = mllm.states(pixels, [layer_site(1)])[layer_site(1)]
    if first_image_token != len(before) + tokens or torch.equal(states[:, 0], changed[:, 0]):
        raise UserError(
            f"{tokens} dummy tokens were inserted, but the image starts at token {first_image_token} after a prompt of "
            f"{len(before)}, and the first layer's state of patch 0 is {'un' * torch.equal(states, changed)}changed"
        )


def _change(without: PatchCounts, read: PatchCounts, weights: Tensor, columns: int) -> dict[str, dict]:
    """Return the change of accuracy at patch 0 and over the first row."""
    pooled = {name: counts.pool([0], range(columns)) for name, counts in (("without", without), ("with", read))}
    value, resampled = (x["with"] - x["without"] for x in patch_accuracy(pooled, weights))
    return {
        name: {"value": value[i].item(), "ci95": interval(value[i].item(), resampled[:, i])}
        for i, name in enumerate(("patch_0", "first_row"))
    }
