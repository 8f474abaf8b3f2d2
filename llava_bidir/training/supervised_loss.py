"""Forward pass of a micro-batch and its loss, without waiting for the device.

Logits are computed for supervised tokens only. The host knows which they are and where images are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration, build_masks


def supervised_loss(model: LlavaBidirForConditionalGeneration, batch: dict[str, Any]) -> Tensor:
    """Return the mean cross-entropy over the supervised tokens of a micro-batch, 0 if there are none.

    Args:
        model: Model in training or evaluation.
        batch: From :class:`llava_bidir.data.collate.Collate`.
    """
    targets = batch["labels"].flatten()[batch["predicts"] + 1]
    with (
        _head_computes(model, partial(_summed_loss, batch["predicts"], targets)),
        _not_warned(model),
    ):
        # the head returns the summed loss in place of logits
        total = model(
            inputs_embeds=_embed(model, batch),
            attention_mask=_attention_mask(model, batch),
            use_cache=False,
        ).logits
    return total / max(batch["supervised"], 1)


def _summed_loss(
    positions: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    states: Tensor,
) -> Tensor:
    """Return the summed cross-entropy at these positions of the flattened rows of states, f[B, N, d]."""
    return F.cross_entropy(head(states.flatten(0, 1)[positions]).float(), targets, reduction="sum")


def _embed(model: LlavaBidirForConditionalGeneration, batch: dict[str, Any]) -> Tensor:
    """Return the LLM's input f[B, N, d], with the features of the images at their tokens.

    LlavaModel.forward finds these tokens on the device, and waits for it to count them and for the gradient. Text alone
    is embedded here, too: under ZeRO-3 all ranks gather weights in one order, whether their batches have images or not.
    """
    embedded = model.get_input_embeddings()(batch["input_ids"])
    if batch["pixel_values"] is None:
        return embedded
    features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output).to(
        embedded.dtype
    )
    return (
        embedded.flatten(0, 1).index_copy(0, batch["image_positions"], features).view_as(embedded)
    )


@contextmanager
def _not_warned(model: LlavaBidirForConditionalGeneration) -> Iterator[None]:
    """Keep the model from warning that embeddings of text could contain images."""
    model._warn_of_embedded_images = lambda attention_mask: None
    try:
        yield
    finally:
        del model._warn_of_embedded_images


def _attention_mask(model: LlavaBidirForConditionalGeneration, batch: dict[str, Any]):
    """Return the masks, None where attention is causal.

    No mask is needed for padding: it is on the right, where neither text nor image tokens attend.
    """
    config = model.config
    if config.image_attention == "causal" or batch["pixel_values"] is None:
        return None
    is_image = batch["input_ids"] == config.image_token_id
    return build_masks(
        config.image_attention, config.get_text_config(), is_image, dtype=model.dtype
    )


@contextmanager
def _head_computes(
    model: LlavaBidirForConditionalGeneration, function: Callable[..., Tensor]
) -> Iterator[None]:
    """Make the head return function(head, states) instead of head(states).

    Its `forward` is replaced, not the call of the module, whose hooks gather the weight under ZeRO-3.
    """
    head = model.get_output_embeddings()
    own = vars(head).get("forward")  # a library may have replaced it before
    head.forward = partial(function, head.forward)
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
