"""Registry of vision encoders: one entry per encoder family, with all settings that differ between families.

The patch grid and the covered pixels follow from image and patch size. Encoders are always frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf import load_weights, read_pretrained
from llava_bidir.common.images import MAX_GRID_SIDE, check_image_px


def resize_stored_positions(tower: PreTrainedModel, image_px: int) -> None:
    """Replace the stored positions of a CLIP or SigLIP tower by transformers' interpolation of them.

    The tower is then an ordinary one of `image_px`: no code that reads it needs `interpolate_pos_encoding`.
    """
    embeddings = tower.embeddings
    side = image_px // embeddings.patch_size
    with torch.no_grad():
        table = embeddings.position_embedding.weight
        extra = embeddings.num_positions - embeddings.num_patches  # 1 for CLIP's CLS token
        tokens = torch.empty(1, side * side + extra, table.shape[1])
        positions = embeddings.interpolate_pos_encoding(tokens, image_px, image_px)[0]
        embeddings.position_embedding = nn.Embedding.from_pretrained(
            positions.to(table), freeze=True
        )
    embeddings.num_patches = side * side
    embeddings.num_positions = len(positions)
    embeddings.register_buffer("position_ids", torch.arange(len(positions))[None], persistent=False)
    embeddings.image_size = image_px
    tower.config.image_size = image_px


@dataclass(frozen=True)
class EncoderEntry:
    """Settings of an encoder family.

    Args:
        config_class: Configuration class; its `from_pretrained` also reads two-tower checkpoints.
        model_class: Class of the vision tower.
        layer: Index of the hidden states that the adapter reads. LLaVA reads the last but one.
        extra_tokens: Number of tokens before the patches: CLS, then registers. SigLIP has none, and dropping one there
            would lose patch 0.
        image_px: Side of the square input; None uses the checkpoint's.
        mean, std: Pixel statistics. Padding has the mean colour.
        resize_positions: (tower, side in pixels) -> None; fits a loaded tower to another side. None: its forward fits
            the positions to the pixels that it is given.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    layer: int
    extra_tokens: int
    image_px: int | None
    mean: list[float]
    std: list[float]
    resize_positions: Callable[[PreTrainedModel, int], None] | None = None


IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

ENCODERS: dict[str, EncoderEntry] = {
    "clip": EncoderEntry(
        CLIPVisionConfig,
        CLIPVisionModel,
        layer=-2,
        extra_tokens=1,
        image_px=None,
        mean=OPENAI_CLIP_MEAN,
        std=OPENAI_CLIP_STD,
        resize_positions=resize_stored_positions,
    ),
    # 336 px gives CLIP's 24 x 24 grid; the position embeddings of the 37 x 37 grid are interpolated by the model.
    "dinov2": EncoderEntry(
        Dinov2Config,
        Dinov2Model,
        layer=-2,
        extra_tokens=1,
        image_px=336,
        **IMAGENET,
    ),
    "dinov2_registers": EncoderEntry(
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        layer=-2,
        extra_tokens=5,
        image_px=336,
        **IMAGENET,
    ),
    # Rotary positions, for any side; 336 px are 21 patches of 16 px.
    "dinov3": EncoderEntry(
        DINOv3ViTConfig,
        DINOv3ViTModel,
        layer=-2,
        extra_tokens=5,
        image_px=336,
        **IMAGENET,
    ),
    # 384 px are 27 patches of 14 px; no patch covers the last 6 px at the right and the bottom.
    "siglip": EncoderEntry(
        SiglipVisionConfig,
        SiglipVisionModel,
        layer=-2,
        extra_tokens=0,
        image_px=None,
        mean=IMAGENET_STANDARD_MEAN,
        std=IMAGENET_STANDARD_STD,
        resize_positions=resize_stored_positions,
    ),
}


@dataclass(frozen=True)
class Encoder:
    """The vision encoder of a model.

    Args:
        name: Key of ENCODERS.
        path: Directory or hub id of a vision tower, or of a two-tower checkpoint that includes one.
        layer: Index of the hidden states that the adapter reads, instead of the entry's.
        image_px: Side of the square input in pixels, a multiple of the patch, instead of the entry's. The positions of
            the patches are interpolated as the encoder's own model in transformers does it.
    """

    name: str
    path: str
    layer: int | None = None
    image_px: int | None = None

    def __post_init__(self):
        if self.name not in ENCODERS:
            raise UserError(f"unknown encoder {self.name!r}; registered: {', '.join(ENCODERS)}")

    @property
    def entry(self) -> EncoderEntry:
        """Settings of the encoder family."""
        return ENCODERS[self.name]

    @property
    def feature_layer(self) -> int:
        """Index of the hidden states that the adapter reads."""
        return self.entry.layer if self.layer is None else self.layer

    def load_config(self) -> PreTrainedConfig:
        """Return the vision tower's configuration.

        Raises:
            UserError: The checkpoint at `path` is not of the family `name`, its sizes do not give a valid grid, or it
                lacks the layer.
        """
        config = read_pretrained("model.encoder.path", AutoConfig, self.path)
        model_type = getattr(config, "vision_config", config).model_type
        if model_type != self.entry.config_class.model_type:
            raise UserError(
                f"encoder {self.path!r} is a {model_type!r} checkpoint, but name {self.name!r} expects "
                f"{self.entry.config_class.model_type!r}; change model.encoder.name or model.encoder.path"
            )
        config = read_pretrained("model.encoder.path", self.entry.config_class, self.path)
        registers = getattr(config, "num_register_tokens", 0)
        expected = max(self.entry.extra_tokens - 1, 0)
        if registers != expected:
            raise UserError(
                f"encoder {self.path!r} has {registers} register tokens, but name {self.name!r} expects {expected}: "
                "registers would be treated as patches, or patches dropped"
            )
        if self.image_px is not None:
            check_image_px(self.image_px, config.patch_size, "model.encoder.image_px")
            # else the checkpoint's side stays that of the stored positions
            if self.entry.image_px is None:
                config.image_size = self.image_px
        self.grid(config)  # raises for an invalid grid
        layers = config.num_hidden_layers
        if not 1 <= abs(self.feature_layer) <= layers:
            raise UserError(
                f"model.encoder.layer {self.feature_layer}: encoder {self.path!r} has {layers} layers; expected 1 to "
                f"{layers}, or -{layers} to -1"
            )
        return config

    def load_tower(self, **options) -> PreTrainedModel:
        """Return the vision tower with its weights, fitted to `image_px`; `options` are those of `from_pretrained`."""
        tower = load_weights("model.encoder.path", self.entry.model_class, self.path, **options)
        if self.image_px is not None and self.entry.resize_positions is not None:
            self.entry.resize_positions(tower, self.image_px)
        return tower

    def side_px(self, config: PreTrainedConfig) -> int:
        """Return the side of the square input in pixels."""
        return self.image_px or self.entry.image_px or config.image_size

    def grid(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Return the number of patch rows and columns; their product is the number of image tokens per image."""
        with error_context(f"encoder {self.path!r}"):
            side = self.side_px(config) // config.patch_size
            if not 1 <= side <= MAX_GRID_SIDE:
                raise UserError(
                    f"patches of {config.patch_size} px make {side} a side of {self.side_px(config)} px; expected "
                    f"1..{MAX_GRID_SIDE}"
                )
        return side, side

    def image_processor(
        self, config: PreTrainedConfig, image_resize: str
    ) -> LlavaImageProcessorPil:
        """Return the image processor for `image_resize`.

        "pad" pads to a square with the mean colour; "center_crop" crops the centre to the short side. Source: LLaVA
        train.py --image_aspect_ratio (stage 1 does not set it, so the encoder's crop applies).

        Deviates: SigLIP's own processor resizes without a crop; here all encoders crop alike.
        """
        side = self.side_px(config)
        return LlavaImageProcessorPil(
            do_pad=image_resize == "pad",
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(self.entry.mean),
            image_std=list(self.entry.std),
        )
