"""Recomputation of the LLM's layers in the backward pass: all of them, or as many as memory requires."""

from torch import nn

from llava_bidir.common.errors import UserError


def count_checkpointed(setting: bool | int, layers: int) -> int:
    """Return how many of `layers` layers `model.gradient_checkpointing` recomputes.

    Raises:
        UserError: There are fewer layers.
    """
    count = layers * setting if isinstance(setting, bool) else setting
    if not 0 <= count <= layers:
        raise UserError(
            f"model.gradient_checkpointing must be true, false, or a number of layers from 0 to {layers}, got {setting}"
        )
    return count


def checkpoint_layers(llm: nn.Module, setting: bool | int) -> None:
    """Keep only the inputs of the first layers, and recompute the rest in the backward pass.

    The last layers keep their activations: these are freed before the first layers are recomputed, one at a time.

    Args:
        llm: Decoder of transformers with `layers`.
        setting: True for all layers, or their number.

    Raises:
        UserError: The LLM has fewer layers.
    """
    count = count_checkpointed(setting, len(llm.layers))
    if count:
        llm.activation_checkpointing_enable({"use_reentrant": False})
    for layer in llm.layers[count:]:
        layer.gradient_checkpointing = False
