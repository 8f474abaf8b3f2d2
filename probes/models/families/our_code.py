"""What probes take from the code of our own model: its class, its masks and the head of its logits."""

from llava_bidir.model.modeling_llava_bidir import (
    FULL,
    SLIDING,
    LlavaBidirForConditionalGeneration,
    LogitHead,
    block_ids_of,
    build_mask,
    layer_kinds,
)

__all__ = [
    "FULL",
    "SLIDING",
    "LlavaBidirForConditionalGeneration",
    "LogitHead",
    "block_ids_of",
    "build_mask",
    "layer_kinds",
]
