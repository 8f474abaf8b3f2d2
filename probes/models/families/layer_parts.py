"""The parts of layers as sites: what is known of them from family and config, and where a layer has them.

"value_07" are the values of layer 7 as its attention reads them, heads side by side; under grouped-query attention its
key-value heads, not repeated. "attn_07" and "mlp_07" are what the layer adds, after the output projection and whatever
norm, scale or multiplier a family has before the addition; LFM2 has a convolution in place of attention in some layers.
The output of a layer is its input plus both, except in Gemma 4, whose layers also add an embedding of their own and
scale the sum. The input is the output of the layer before, except after the first layers of Qwen3-VL, where features of
the encoder are added in between. In Cohere's layers attention and MLP read the same input.
"""

from collections.abc import Collection, Iterable

from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.encoders import vision_config
from llava_bidir.common.errors import UserError
from probes.models.sites import (
    LAYER_PARTS,
    PATCHES,
    VALUE,
    is_layer,
    layer_number,
    part_names,
    part_of,
)

from .encoders import AnyFamily
from .modules import MODULE_TYPE, why_no_parts

# Paths in a layer of the module whose output is the part. A layer's part is that of the first one that it has.
PART_MODULES = {
    VALUE: (
        "self_attn.v_norm",  # Gemma 4
        "self_attn.v_proj",
        "self_attn.qkv_proj",  # Phi-3: queries, keys and values side by side
        "attention.v_proj",  # ViT, DINO
        "attention.attention.value",  # Data2Vec
    ),
    "attn": (
        "layer_scale1",  # DINO
        "post_self_attn_layernorm",  # GLM-4V
        "self_attn",
        "linear_attn",  # Qwen3.5
        "conv",  # LFM2, in place of attention
        "attention",
    ),
    "mlp": (
        "layer_scale2",
        "post_mlp_layernorm",
        "post_feedforward_layernorm",  # Gemma
        "mlp",
        "feed_forward",  # LFM2
        "ffn",  # AIMv2
        "output",  # Data2Vec: the second half of its MLP
    ),
}
# kinds of layers, as configs name them, whose values cannot be read
WITHOUT_VALUES = {
    "linear_attention": "linear attention, which mixes values over tokens",
    "conv": "a convolution in place of attention",
}


def part_sites(family: AnyFamily, config: PreTrainedConfig) -> list[str]:
    """Return the sites inside the layers in forward order, without values that cannot be read."""
    sites = []
    for site in family.sites(config):
        if is_layer(site) and site != PATCHES:
            sites += part_names(layer_number(site))
    return [site for site in sites if not why_no_part(family, config, site)]


def why_no_part(family: AnyFamily, config: PreTrainedConfig, site: str) -> str:
    """Return why a part of a layer cannot be read, "" if it can or the site is another one."""
    if config.model_type == MODULE_TYPE and part_of(site):
        why = why_no_parts(config)
        if part_of(site) == VALUE:
            why = "where a module of your own has its values is not known"
        return why and f"{why}; leave out {site}"
    if part_of(site) != VALUE:
        return ""
    layer_config = vision_config(config)
    if family.has_llm:
        layer_config = config.get_text_config()
    layer = layer_number(site)
    kinds = getattr(layer_config, "layer_types", None) or []
    why = "".join(WITHOUT_VALUES.get(kind, "") for kind in kinds[layer - 1 : layer])
    if getattr(layer_config, "kv_lora_rank", None):  # DeepSeek-V3
        why = "latent attention, which expands values from one vector for all heads"
    if why:
        return f"layer {layer} has {why}; leave out {site}"
    shared = getattr(layer_config, "num_kv_shared_layers", None) or 0
    if layer_config.num_hidden_layers - shared < layer <= layer_config.num_hidden_layers:
        return f"layer {layer} has no values of its own, but reads those of an earlier layer; leave out {site}"
    return ""


def parts_text(kinds: Collection[str]) -> str:
    """Return the names of the sites inside layers, of some kinds of parts: "attn_NN and mlp_NN inside layer_NN"."""
    *others, names = [f"{part}_NN" for part in LAYER_PARTS if part in kinds]
    if others:
        names = f"{', '.join(others)} and {names}"
    return f"{names} inside layer_NN"


def part_module(layer: nn.Module, site: str) -> nn.Module:
    """Return the module of a layer whose output is the part that a site names.

    Raises:
        UserError: The layer has none of the known modules.
    """
    part = part_of(site)
    module = find_part(layer, part)
    if module is None:
        expected = ", ".join(PART_MODULES[part])
        raise UserError(
            f"{site} cannot be read: {type(layer).__name__} has none of the modules {expected}"
        )
    return module


def part_width(layer: nn.Module, site: str, width: int) -> int:
    """Return the width of the states of a part, in a layer of `width` channels.

    Raises:
        UserError: The layer has no such part.
    """
    part_module(layer, site)
    if part_of(site) != VALUE:
        return width
    attention = getattr(layer, "self_attn", None) or layer.attention
    paths = ("o_proj", "out_proj", "output_proj", "output.dense")  # of what reads all heads
    output = _first_module(attention, paths)
    return output.in_features // getattr(attention, "num_key_value_groups", 1)


def part_multiplier(layer: nn.Module, part: str) -> float | Tensor | None:
    """Return what a layer multiplies the output of attention or MLP by before it adds it; None for nothing."""
    name = {"attn": "lambda_1", "mlp": "lambda_2"}.get(part, "")  # BEiT, Data2Vec
    multiplier = getattr(layer, name, None)
    if multiplier is None:
        return getattr(layer, "residual_multiplier", None)  # Granite
    return multiplier


def find_part(layer: nn.Module, part: str) -> nn.Module | None:
    """Return the module of a layer whose output is a part of it, "value", "attn" or "mlp"; None if there is none."""
    paths = getattr(layer, "own_parts", PART_MODULES)[part]  # of a user's module
    if part == "attn" and hasattr(layer, "post_feedforward_layernorm"):
        # Gemma, EXAONE and OLMo 2; in all other families a norm of this name comes before the MLP
        paths = ("post_attention_layernorm", *paths)
    return _first_module(layer, paths)


def _first_module(parent: nn.Module, paths: Iterable[str]) -> nn.Module | None:
    """Return the module at the first of some paths that a module has; None if it has none of them."""
    for path in paths:
        module = parent
        for name in path.split("."):
            module = getattr(module, name, None)
        if module is not None:
            return module
    return None
