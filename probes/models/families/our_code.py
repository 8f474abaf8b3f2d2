"""What probes take from the code of our own model: its class, its masks and the head of its logits."""

from llava_bidir.model.modeling_llava_bidir import (  # noqa: F401 - imported from here
    FULL,
    SLIDING,
    LlavaBidirForConditionalGeneration,
    LogitHead,
    block_ids_of,
    build_mask,
    layer_kinds,
)
