"""Registry of vision encoders: one entry per encoder family, with all settings that differ between families.

The patch grid and the covered pixels follow from image and patch size. Encoders are always frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    LlavaConfig,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
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

from llava_bidir.common.cli import Count
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import read_model_config, read_pretrained
from llava_bidir.common.images import check_image_px


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
        model_class: Class of the vision tower; its configuration also reads two-tower checkpoints.
        image_px: Side of the square input, to which the model interpolates its positions. None: the checkpoint's; for
            another side its stored positions are replaced.
        mean, std: Pixel statistics. Padding has the mean colour.
        has_cls: Whether a CLS token comes first. SigLIP has none, and dropping one there would lose patch 0.
    """

    model_class: type[PreTrainedModel]
    image_px: int | None = None
    mean: Sequence[float] = tuple(IMAGENET_DEFAULT_MEAN)
    std: Sequence[float] = tuple(IMAGENET_DEFAULT_STD)
    has_cls: bool = True


ENCODERS: dict[str, EncoderEntry] = {
    "clip": EncoderEntry(CLIPVisionModel, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD),
    # 336 px gives CLIP's 24 x 24 grid; the position embeddings of the 37 x 37 grid are interpolated by the model.
    "dinov2": EncoderEntry(Dinov2Model, 336),
    "dinov2_registers": EncoderEntry(Dinov2WithRegistersModel, 336),
    # Rotary positions, for any side; 336 px are 21 patches of 16 px.
    "dinov3": EncoderEntry(DINOv3ViTModel, 336),
    # 384 px are 27 patches of 14 px; no patch covers the last 6 px at the right and the bottom.
    "siglip": EncoderEntry(
        SiglipVisionModel, mean=IMAGENET_STANDARD_MEAN, std=IMAGENET_STANDARD_STD, has_cls=False
    ),
}


@dataclass(frozen=True)
class Encoder:
    """The vision encoder of a model.

    Args:
        name: Key of ENCODERS.
        path: Directory or hub id of a vision tower, of a two-tower checkpoint that includes one, or of a llava, whose
            encoder alone is taken.
        layer: Index of the hidden states that the adapter reads. LLaVA reads the last but one.
        image_px: Side of the square input in pixels, a multiple of the patch, instead of the entry's. The positions of
            the patches are interpolated as the encoder's own model in transformers does it.
    """

    name: str
    path: str
    layer: int = -2
    image_px: Count | None = None

    def __post_init__(self):
        if self.name not in ENCODERS:
            raise UserError(f"unknown encoder {self.name!r}; registered: {', '.join(ENCODERS)}")

    @property
    def entry(self) -> EncoderEntry:
        """Settings of the encoder family."""
        return ENCODERS[self.name]

    def load_config(self) -> PreTrainedConfig:
        """Return the vision tower's configuration.

        Raises:
            UserError: The checkpoint at `path` is not of the family `name`, `image_px` does not suit it,
                or it lacks the layer.
        """
        config = read_model_config("model.encoder.path", self.path)
        vision_config = getattr(config, "vision_config", config)
        model_type = vision_config.model_type
        config_class = self.entry.model_class.config_class
        if model_type != config_class.model_type:
            raise UserError(
                f"encoder {self.path!r} is a {model_type!r} checkpoint, but name {self.name!r} expects "
                f"{config_class.model_type!r}; change model.encoder.name or model.encoder.path"
            )
        if isinstance(config, LlavaConfig):
            config = vision_config
        else:
            config = read_pretrained("model.encoder.path", config_class, self.path)
        if self.image_px is not None:
            check_image_px(self.image_px, config.patch_size, "model.encoder.image_px")
            if self.entry.image_px is None:  # else the checkpoint's side is that of its positions
                config.image_size = self.image_px
        layers = config.num_hidden_layers
        if not 1 <= abs(self.layer) <= layers:
            raise UserError(
                f"model.encoder.layer {self.layer}: encoder {self.path!r} has {layers} layers; expected 1 to "
                f"{layers}, or -{layers} to -1"
            )
        return config

    def side_px(self, config: PreTrainedConfig) -> int:
        """Return the side of the square input in pixels."""
        return self.image_px or self.entry.image_px or config.image_size

    def image_tokens(self, config: PreTrainedConfig) -> int:
        """Return the number of patches of a square image, each of which is an image token."""
        return (self.side_px(config) // config.patch_size) ** 2

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
