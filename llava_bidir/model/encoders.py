"""Registry of vision encoders: one entry per encoder family, with all settings that differ between families.

The patch grid and the covered pixels follow from image and patch size. Encoders are always frozen.
"""

from dataclasses import dataclass

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
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
from llava_bidir.common.hf_loading import read_pretrained

MAX_GRID_SIDE = 128  # patches per side; the largest encoders have 64


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
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    layer: int
    extra_tokens: int
    image_px: int | None
    mean: list[float]
    std: list[float]


ENCODERS: dict[str, EncoderEntry] = {
    "clip": EncoderEntry(CLIPVisionConfig, CLIPVisionModel, -2, 1, None, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    # 336 px gives CLIP's 24 x 24 grid; the position embeddings of the 37 x 37 grid are interpolated by the model.
    "dinov2": EncoderEntry(Dinov2Config, Dinov2Model, -2, 1, 336, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_registers": EncoderEntry(
        Dinov2WithRegistersConfig, Dinov2WithRegistersModel, -2, 5, 336, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    ),
    # 384 px are 27 patches of 14 px; no patch covers the last 6 px at the right and the bottom.
    "siglip": EncoderEntry(
        SiglipVisionConfig, SiglipVisionModel, -2, 0, None, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
    ),
}


@dataclass(frozen=True)
class Encoder:
    """The vision encoder of a model.

    Args:
        name: Key of ENCODERS.
        path: Directory or hub id of a vision tower, or of a two-tower checkpoint that includes one.
        layer: Index of the hidden states that the adapter reads, instead of the entry's.
    """

    name: str
    path: str
    layer: int | None = None

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
        registers, expected = getattr(config, "num_register_tokens", 0), max(self.entry.extra_tokens - 1, 0)
        if registers != expected:
            raise UserError(
                f"encoder {self.path!r} has {registers} register tokens, but name {self.name!r} expects {expected}: "
                "registers would be treated as patches, or patches dropped"
            )
        self.grid(config)  # raises for an invalid grid
        layers = config.num_hidden_layers
        if not 1 <= abs(self.feature_layer) <= layers:
            raise UserError(
                f"model.encoder.layer {self.feature_layer}: encoder {self.path!r} has {layers} layers; expected 1 to "
                f"{layers}, or -{layers} to -1"
            )
        return config

    def image_px(self, config: PreTrainedConfig) -> int:
        """Return the side of the square input in pixels."""
        return self.entry.image_px or config.image_size

    def grid(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Return the number of patch rows and columns; their product is the number of image tokens per image."""
        with error_context(f"encoder {self.path!r}"):
            side = self.image_px(config) // config.patch_size
            if not 1 <= side <= MAX_GRID_SIDE:
                raise UserError(
                    f"patches of {config.patch_size} px make {side} a side of {self.image_px(config)} px; expected "
                    f"1..{MAX_GRID_SIDE}"
                )
        return side, side

    def image_processor(self, config: PreTrainedConfig, image_resize: str) -> LlavaImageProcessorPil:
        """Return the image processor for `image_resize`.

        "pad" pads to a square with the mean colour; "center_crop" crops the centre to the short side. Source: LLaVA
        train.py --image_aspect_ratio (stage 1 does not set it, so the encoder's crop applies).

        Deviates: SigLIP's own processor resizes without a crop; here all encoders crop alike.
        """
        if image_resize not in ("pad", "center_crop"):
            raise UserError(
                f"unknown image_resize {image_resize!r}; expected pad (stage 2, evaluation) or center_crop (stage 1)"
            )
        side = self.image_px(config)
        return LlavaImageProcessorPil(
            do_pad=image_resize == "pad",
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(self.entry.mean),
            image_std=list(self.entry.std),
        )
