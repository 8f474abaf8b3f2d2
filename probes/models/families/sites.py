"""The sites of a model from its family and config: the encoder's own layers in an MLLM, parts of layers, and choices.

"encoder_00" is the input of the encoder's first layer (patch embeddings with their positions), "encoder_01" ... are the
outputs of its layers, before any norm. Where an image token merges m x m patches, the states of the patches are
concatenated, as they are at the site "encoder": all sites of a model have one grid.

"value_07" are the values of layer 7 as its attention reads them, heads side by side; under grouped-query attention its
key-value heads, not repeated. "attn_07" and "mlp_07" are what the layer adds, after the output projection and whatever
norm, scale or multiplier a family has before the addition; LFM2 has a convolution in place of attention in some layers.
The output of a layer is its input plus both, except in Gemma 4, whose layers also add an embedding of their own and
scale the sum. The input is the output of the layer before, except after the first layers of Qwen3-VL, where features of
the encoder are added in between. In Cohere's layers attention and MLP read the same input.

Shapes: B images, T image tokens on a grid h x w, m x m patches a token, N tokens, A heads, d width.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError
from probes.models.sites import (
    ALL,
    ALL_PARTS,
    PARTS,
    PATCHES,
    VALUE,
    encoder_site,
    is_encoder_layer,
    is_layer,
    layer_number,
    part_names,
    part_of,
    with_parts,
)

from .base import Family, module_at, patch_size
from .encoders import ENCODERS, EncoderFamily, count_extra_tokens, vision_config
from .modules import MODULE_TYPE, why_no_parts

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel

ADVICE = "leave out sites that begin with encoder_"


# ------------------------------------------------------------------------------ the encoder's own layers in an MLLM
@dataclass(frozen=True)
class Tower:
    """How to read the layers of one kind of vision model.

    Args:
        layers: Path of the list of layers in the vision model.
        extra_tokens, extra_keys: Tokens before the patches, as in :class:`EncoderFamily`.
        by_token: True if patches are ordered by the image token that they are merged into; else in raster order.
        width: Key of the width of the states of a patch in its config.
        count: Key of the number of layers.
    """

    layers: str
    extra_tokens: int = 0
    extra_keys: tuple[str, ...] = ()
    by_token: bool = False
    width: str = "hidden_size"
    count: str = "num_hidden_layers"


_BY_TOKEN = {"by_token": True, "count": "depth"}
TOWERS: dict[str, Tower] = {
    kind: Tower(family.layers, family.extra_tokens, family.extra_keys)
    for kind, family in ENCODERS.items()
}
TOWERS |= {
    "internvl_vision": Tower("encoder.layer", extra_tokens=1),
    "qianfan_ocr_vision": Tower("layers", extra_tokens=1),
    "paddleocr_vl_vision": Tower("vision_model.encoder.layers"),
    "kimi_k25_vision": Tower("layers"),
    "video_llama_3_vision": Tower("encoder.layers"),
    "pixtral": Tower("transformer.layers"),
    "ovis2_vision": Tower("transformer.encoder.layers"),
    "qwen2_vl_vision": Tower("blocks", width="embed_dim", **_BY_TOKEN),
    "idefics3_vision": Tower("encoder.layers"),
    "smolvlm_vision": Tower("encoder.layers"),
    "janus_vision_model": Tower("encoder.layers"),
    "qwen3_vl_vision": Tower("blocks", **_BY_TOKEN),
    "qwen3_vl_moe_vision": Tower("blocks", **_BY_TOKEN),
    "qwen3_5_vision": Tower("blocks", **_BY_TOKEN),
    "qwen3_5_moe_vision": Tower("blocks", **_BY_TOKEN),
    "glm4v": Tower("blocks", **_BY_TOKEN),
    "glm4v_vision": Tower("blocks", **_BY_TOKEN),
    "glm4v_moe_vision": Tower("blocks", **_BY_TOKEN),
    "glm_ocr_vision": Tower("blocks", **_BY_TOKEN),
}
# whose order of patches is that of windows of attention
WINDOWS = ("qwen2_5_vl_vision", "exaone4_5_vision")


@dataclass(frozen=True)
class EncoderLayers:
    """The layers of the encoder of one MLLM.

    Args:
        path: Path of the list of layers in `model.model`.
        count: Number of layers.
        extra_tokens: Number of tokens before the patches.
        merged: m, patches of an image token per side.
        by_token: Order of the patches, see :class:`Tower`.
        width: Width of the states of an image token, m * m * d.
        grid: h and w.
    """

    path: str
    count: int
    extra_tokens: int
    merged: int
    by_token: bool
    width: int
    grid: tuple[int, int]

    @property
    def sites(self) -> list[str]:
        """The sites in forward order: the input of the first layer, then the output of each."""
        return [encoder_site(i) for i in range(self.count + 1)]

    def modules(self, model: "PreTrainedModel") -> nn.ModuleList:
        """Return the layers."""
        return module_at(model, self.path, "model")

    def to_tokens(self, hidden: Tensor, images: int) -> Tensor:
        """Return the states of a layer as f[B, T, m * m * d].

        Args:
            hidden: f[B, extra + patches, d], or the patches of all images in one row.
            images: B.

        Raises:
            UserError: There are not m * m patches for each image token.
        """
        rows, columns = self.grid
        m = self.merged
        width = self.width // m**2
        patches = rows * columns * m**2
        if hidden.numel() != images * (self.extra_tokens + patches) * width:
            raise UserError(
                f"a layer of the encoder outputs {list(hidden.shape)} for {images} images; expected {patches} patches "
                f"of width {width} for each. The family's entry does not fit"
            )
        hidden = hidden.reshape(images, self.extra_tokens + patches, width)
        hidden = hidden[:, self.extra_tokens :]
        if m == 1 or self.by_token:
            return hidden.reshape(images, rows * columns, m * m * width)
        cells = hidden.reshape(images, rows, m, columns, m, width)
        return cells.transpose(2, 3).reshape(images, rows * columns, m * m * width)


def encoder_layers(family: Family, config: PreTrainedConfig) -> EncoderLayers:
    """Return how to read the encoder's own layers in an MLLM.

    Raises:
        UserError: They cannot be read as sites; the message says why.
    """
    kind = config.model_type
    if family.vision_tower is None:
        raise UserError(f"{kind} has no encoder, or two without common layers; {ADVICE}")
    vision = config.vision_config
    if vision.model_type in WINDOWS:
        raise UserError(
            f"the encoder of {kind} orders its patches by windows of attention, so its layers are not on the grid of "
            f"the image tokens; {ADVICE}"
        )
    if vision.model_type not in TOWERS:
        raise UserError(
            f"the layers of {kind}'s encoder, {vision.model_type}, cannot be read one by one; {ADVICE}"
        )
    tower = TOWERS[vision.model_type]
    grid = family.grid(config)
    per_side = family.covered_px(config) // patch_size(config)
    merged = per_side // grid[0]
    width = merged**2 * getattr(vision, tower.width)
    if family.encoder_width(config) < width:
        raise UserError(
            f"{kind} averages {merged} x {merged} patches for an image token: its encoder's grid is {per_side} x "
            f"{per_side}, that of the image tokens {grid[0]} x {grid[1]}; {ADVICE}"
        )
    return EncoderLayers(
        path=f"{family.vision_tower}.{tower.layers}",
        count=getattr(vision, tower.count),
        extra_tokens=count_extra_tokens(tower, vision),
        merged=merged,
        by_token=tower.by_token,
        width=width,
        grid=grid,
    )


# -------------------------------------------------------------------------------------------- parts of a layer
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


def part_sites(family: Family | EncoderFamily, config: PreTrainedConfig) -> list[str]:
    """Return the sites inside the layers in forward order, without values that cannot be read."""
    sites = []
    for site in family.sites(config):
        if is_layer(site) and site != PATCHES:
            sites += part_names(layer_number(site))
    return [site for site in sites if not why_no_part(family, config, site)]


def why_no_part(family: Family | EncoderFamily, config: PreTrainedConfig, site: str) -> str:
    """Return why a part of a layer cannot be read, "" if it can or the site is another one."""
    if config.model_type == MODULE_TYPE and part_of(site):
        why = why_no_parts(config)
        if part_of(site) == VALUE:
            why = "where a module of your own has its values is not known"
        return why and f"{why}; leave out {site}"
    if part_of(site) != VALUE:
        return ""
    of_layers = config.get_text_config() if family.has_llm else vision_config(config)
    layer = layer_number(site)
    kinds = getattr(of_layers, "layer_types", None) or []
    why = "".join(WITHOUT_VALUES.get(kind, "") for kind in kinds[layer - 1 : layer])
    if getattr(of_layers, "kv_lora_rank", None):  # DeepSeek-V3
        why = "latent attention, which expands values from one vector for all heads"
    if why:
        return f"layer {layer} has {why}; leave out {site}"
    shared = getattr(of_layers, "num_kv_shared_layers", None) or 0
    if of_layers.num_hidden_layers - shared < layer <= of_layers.num_hidden_layers:
        return f"layer {layer} has no values of its own, but reads those of an earlier layer; leave out {site}"
    return ""


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
    own = getattr(layer, name, None) if name else None
    return getattr(layer, "residual_multiplier", None) if own is None else own  # Granite


# --------------------------------------------------------------------------------------------------- choices
def parts_text(kinds: Collection[str]) -> str:
    """Return the names of the sites inside layers, of some kinds of parts: "attn_NN and mlp_NN inside layer_NN"."""
    *others, last = [f"{part}_NN" for part in PARTS if part in kinds]
    return f"{', '.join(others)}{' and ' if others else ''}{last} inside layer_NN"


def encoder_sites(family: Family | EncoderFamily, config: PreTrainedConfig) -> list[str]:
    """Return the sites of the encoder's own layers in an MLLM; of a bare encoder, which has none, [].

    Raises:
        UserError: They cannot be read.
    """
    return encoder_layers(family, config).sites if family.has_llm else []


def all_sites(family: Family | EncoderFamily, config: PreTrainedConfig) -> list[str]:
    """Return all sites in forward order; without encoder layers and values that cannot be read."""
    try:
        in_encoder = encoder_sites(family, config)
    except UserError:
        in_encoder = []
    return with_parts([*in_encoder, *family.sites(config)], part_sites(family, config))


def chosen_sites(
    family: Family | EncoderFamily, config: PreTrainedConfig, sites: str | Sequence[str] | None
) -> list[str]:
    """Return the names of the chosen sites, in the order of the choice.

    Args:
        family: The model's family.
        config: Its config.
        sites: Names; None for the main path without the encoder's own layers in an MLLM, "all" with these, "all_parts"
            for :func:`all_sites`.

    Raises:
        UserError: A site is unknown, is a layer of an encoder whose layers cannot be read, or is a part that its
            layer does not have.
    """
    own = family.sites(config)
    if sites is None:
        return own
    if sites in (ALL, [ALL]):
        return [*encoder_sites(family, config), *own]
    if sites in (ALL_PARTS, [ALL_PARTS]):
        return all_sites(family, config)
    if isinstance(sites, str):
        raise UserError(f"sites must be a list of names, or 'all', or 'all_parts'; got {sites!r}")
    if any(map(is_encoder_layer, sites)):
        own = [*encoder_sites(family, config), *own]
    parts = part_sites(family, config) if any(map(part_of, sites)) else []
    if unknown := set(sites) - {*own, *parts}:
        site = min(unknown)
        why = why_no_part(family, config, site)
        known = {part_of(part) for part in parts or part_sites(family, config)}
        inside = f", and {parts_text(known)}" if known else ""
        raise UserError(why or f"unknown site {site!r}; this model has {', '.join(own)}{inside}")
    return list(sites)
