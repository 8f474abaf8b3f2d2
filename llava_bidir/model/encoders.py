"""The vision encoder that a model is trained with: a checkpoint of a kind of the table, and what is read of it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import LlavaConfig, LlavaImageProcessorPil, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from llava_bidir.common.cli import Count
from llava_bidir.common.encoders import (
    ENCODERS,
    UNCHANGED,
    EncoderKind,
    count_extra_tokens,
    encoder_kind,
    interpolating_inputs,
    plain_inputs,
    square_side,
    stored_side,
)
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.hf import read_model_config, read_pretrained
from llava_bidir.common.images import check_image_px

SHORT_NAMES = {"dinov2_registers": "dinov2_with_registers", "dinov3": "dinov3_vit"}


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
class Encoder:
    """The vision encoder of a model.

    Args:
        name: Kind that the checkpoint has to be of, a key of the table or a short name; by default its config says it.
        path: Directory or hub id of a vision tower, of a two-tower checkpoint that includes one, or of a llava, whose
            encoder alone is taken.
        layer: Index of the hidden states that the adapter reads. LLaVA reads the last but one.
        image_px: Side of the square input in pixels, a multiple of the patch. The positions of the patches are
            interpolated as the encoder's own model in transformers does it.
        norm: Apply the encoder's final norm to the layer that is read.
    """

    name: str | None = None
    path: str = ""
    layer: int = -2
    image_px: Count | None = None
    norm: bool = False

    def __post_init__(self):
        if not self.path or self.path.startswith("timm:"):
            raise UserError(
                "model.encoder.path: expected a directory or hub id of a vision encoder of transformers; "
                "timm's (PE among them) can be probed, not trained with"
            )
        names = [*SHORT_NAMES, *ENCODERS]
        if self.name is not None and self.name not in names:
            raise UserError(f"unknown encoder {self.name!r}; registered: {', '.join(names)}")

    @cached_property
    def kind(self) -> EncoderKind:
        """Kind of the encoder.

        Raises:
            UserError: It is not in the table, or takes more than the pixels of a square.
        """
        name = SHORT_NAMES.get(self.name, self.name)
        if name is None:
            config = read_model_config("model.encoder.path", self.path)
            name = getattr(config, "vision_config", config).model_type
        with error_context(f"model.encoder.path: {self.path}"):
            kind = encoder_kind(name)
            if kind.inputs not in (plain_inputs, interpolating_inputs):
                raise UserError(
                    f"{name} does not take the pixels of a square (NaFlex takes patches of any aspect, ViT-MAE masks "
                    "them): it can be probed, not trained with"
                )
        return kind

    @property
    def norm_path(self) -> str:
        """Path of the norm in the tower that is applied to the layer; "" if none is."""
        if not self.norm:
            return ""
        if self.kind.norm is None:
            raise UserError(
                f"model.encoder.norm: encoder {self.path!r} has no final norm; leave the option out"
            )
        return self.kind.norm

    @property
    def replaces_positions(self) -> bool:
        """Whether positions for `image_px` replace the stored ones: the model would have to be asked to interpolate."""
        return self.image_px is not None and self.kind.inputs is interpolating_inputs

    def load_config(self) -> PreTrainedConfig:
        """Return the vision tower's configuration.

        Raises:
            UserError: The checkpoint at `path` is not of the kind `name`, `image_px` does not suit it, or it lacks the
                layer or the norm.
        """
        config = read_model_config("model.encoder.path", self.path)
        vision_config = getattr(config, "vision_config", config)
        config_class = self.kind.model_cls.config_class
        if vision_config.model_type != config_class.model_type:
            raise UserError(
                f"encoder {self.path!r} is a {vision_config.model_type!r} checkpoint, but name {self.name!r} expects "
                f"{config_class.model_type!r}; change model.encoder.name or model.encoder.path"
            )
        if isinstance(config, LlavaConfig):
            config = vision_config
        else:
            config = read_pretrained("model.encoder.path", config_class, self.path)
        self._check_side(config)
        if self.replaces_positions:
            config.image_size = self.image_px
        layers = config.num_hidden_layers
        if not 1 <= abs(self.layer) <= layers:
            raise UserError(
                f"model.encoder.layer {self.layer}: encoder {self.path!r} has {layers} layers; expected 1 to "
                f"{layers}, or -{layers} to -1"
            )
        _ = self.norm_path  # raises
        return config

    def _check_side(self, config: PreTrainedConfig) -> None:
        """Raise a UserError if an encoder does not take squares of `image_px`."""
        with error_context("model.encoder.path"):
            stored = stored_side(config)
        if self.image_px is None:
            return
        check_image_px(self.image_px, square_side(config.patch_size), "model.encoder.image_px")
        replaced = getattr(self.kind.model_cls, "_input_embed_layer", None) == "patch_embedding"
        fits = self.kind.any_side and (replaced or not self.replaces_positions)
        if self.image_px != stored and not fits:
            raise UserError(
                f"model.encoder.image_px {self.image_px}: {config.model_type} takes {stored} px only, because its "
                "positions are not interpolated; leave the option out"
            )

    def side_px(self, config: PreTrainedConfig) -> int:
        """Return the side of the square input in pixels."""
        return self.image_px or self.kind.trained_px or stored_side(config)

    def image_tokens(self, config: PreTrainedConfig) -> int:
        """Return the number of patches of a square image, each of which is an image token."""
        return (self.side_px(config) // square_side(config.patch_size)) ** 2

    def extra_tokens(self, config: PreTrainedConfig) -> int:
        """Return the number of tokens before the patches, which the adapter does not read."""
        return count_extra_tokens(self.kind, config)

    def image_processor(
        self, config: PreTrainedConfig, image_resize: str
    ) -> LlavaImageProcessorPil:
        """Return the image processor for `image_resize`, with the checkpoint's mean and standard deviation.

        "pad" pads to a square with the mean colour; "center_crop" crops the centre to the short side. Source: LLaVA
        train.py --image_aspect_ratio (stage 1 does not set it, so the encoder's crop applies).

        Deviates: SigLIP's own processor resizes without a crop; here all encoders crop alike.
        """
        side = self.side_px(config)
        mean, std = self.pixel_statistics()
        return LlavaImageProcessorPil(
            do_pad=image_resize == "pad",
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(mean),
            image_std=list(std),
        )

    def pixel_statistics(self) -> tuple:
        """Return mean and standard deviation of the checkpoint's image processor, or the published ones of its kind."""
        try:
            stored = ImageProcessingMixin.get_image_processor_dict(self.path)[0]
        except OSError:
            return self.kind.pixels
        if stored.get("do_normalize") is False:
            return UNCHANGED
        return stored.get("image_mean") or self.kind.pixels[0], (
            stored.get("image_std") or self.kind.pixels[1]
        )
