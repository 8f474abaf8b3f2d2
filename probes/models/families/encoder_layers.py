"""The layers of an MLLM's encoder as sites, read from its family and config.

"encoder_00" is the input of the encoder's first layer (patch embeddings with their positions), "encoder_01" ... are the
outputs of its layers, before any norm. Where an image token merges m x m patches, the states of the patches are
concatenated, as they are at the site "encoder": all sites of a model have one grid.

Shapes: B images, T image tokens on a grid h x w, m x m patches a token, d width.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.encoders import ENCODERS, count_extra_tokens
from llava_bidir.common.errors import UserError
from probes.models.sites import encoder_site

from .base import Family, module_at, patch_size

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel

ADVICE = "leave out sites that begin with encoder_"


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


_BY_TOKEN = Tower("blocks", by_token=True, count="depth")
TOWERS: dict[str, Tower] = {
    "internvl_vision": Tower("encoder.layer", extra_tokens=1),
    "qianfan_ocr_vision": Tower("layers", extra_tokens=1),
    "paddleocr_vl_vision": Tower("vision_model.encoder.layers"),
    "kimi_k25_vision": Tower("layers"),
    "video_llama_3_vision": Tower("encoder.layers"),
    "pixtral": Tower("transformer.layers"),
    "ovis2_vision": Tower("transformer.encoder.layers"),
    "qwen2_vl_vision": replace(_BY_TOKEN, width="embed_dim"),
    "idefics3_vision": Tower("encoder.layers"),
    "smolvlm_vision": Tower("encoder.layers"),
    "janus_vision_model": Tower("encoder.layers"),
    "qwen3_vl_vision": _BY_TOKEN,
    "qwen3_vl_moe_vision": _BY_TOKEN,
    "qwen3_5_vision": _BY_TOKEN,
    "qwen3_5_moe_vision": _BY_TOKEN,
    "glm4v": _BY_TOKEN,
    "glm4v_vision": _BY_TOKEN,
    "glm4v_moe_vision": _BY_TOKEN,
    "glm_ocr_vision": _BY_TOKEN,
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

    def token_of_patch(self) -> Tensor:
        """Return the image token that each patch is of, i64[P], patches in the encoder's order."""
        tokens = self.grid[0] * self.grid[1]
        patches = tokens * self.merged**2
        numbers = torch.arange(-self.extra_tokens, patches)
        patches_of_token = replace(self, width=self.merged**2).to_tokens(numbers[:, None], images=1)
        token_of_patch = torch.empty(patches, dtype=torch.long)
        token_of_patch[patches_of_token[0]] = torch.arange(tokens)[:, None]
        return token_of_patch

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


def tower_of(model_type: str) -> Tower | None:
    """Return how to read the layers of a vision model; None if that is not known."""
    kind = ENCODERS.get(model_type)
    if kind is None:
        return TOWERS.get(model_type)
    return Tower(kind.layers, kind.extra_tokens, kind.extra_keys)


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
    tower = tower_of(vision.model_type)
    if tower is None:
        raise UserError(
            f"the layers of {kind}'s encoder, {vision.model_type}, cannot be read one by one; {ADVICE}"
        )
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
