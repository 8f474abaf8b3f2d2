"""Configurations of tiny LLMs whose layers are of several kinds."""

import tiny_models
from transformers import Gemma3TextConfig, Lfm2Config, MistralConfig, Qwen3_5TextConfig

from llava_bidir.model.modeling_llava_bidir import FULL, SLIDING

WINDOW = 6
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "vocab_size": tiny_models.VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING_LLMS = {
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW, layer_types=[SLIDING, FULL, SLIDING]
    ),
}
UNMASKED_LLMS = {
    "linear_attention": Qwen3_5TextConfig(
        **SIZES, layer_types=["linear_attention", "linear_attention", FULL]
    ),
    "conv": Lfm2Config(**SIZES, layer_types=["conv", FULL, "conv"]),
}
