"""Vision encoders: one registered entry each, with everything that differs between them.

An entry says which layer LLaVA reads, how many tokens in front are no patches, and how pixels are prepared. Grid and
seen pixels follow from image and patch size. Encoders are always frozen.
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

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import error_context, read_pretrained

MOST_PATCHES = 128  # down or across; the largest encoders have 64


@dataclass(frozen=True)
class EncoderEntry:
    """What a family of encoders needs to be told.

    Args:
        config_class: Its configuration; `from_pretrained` also finds it inside a two-tower checkpoint.
        model_class: Its vision tower.
        layer: The hidden state that feeds the adapter. LLaVA takes the last but one.
        extra_tokens: Tokens in front that are no patches: CLS, and registers behind it. SigLIP has none; to drop one
            there would lose patch 0.
        image_px: Side of the square input; None takes the checkpoint's own.
        mean, std: Pixel statistics. Padding has the mean colour.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    layer: int
    extra_tokens: int
    image_px: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


ENCODERS: dict[str, EncoderEntry] = {
    "clip": EncoderEntry(
        CLIPVisionConfig, CLIPVisionModel, -2, 1, None, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)
    ),
    # 336 px gives CLIP's 24 x 24 grid; the position embeddings of the 37 x 37 grid are interpolated by the model.
    "dinov2": EncoderEntry(
        Dinov2Config, Dinov2Model, -2, 1, 336, tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
    ),
    "dinov2_registers": EncoderEntry(
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        -2,
        5,
        336,
        tuple(IMAGENET_DEFAULT_MEAN),
        tuple(IMAGENET_DEFAULT_STD),
    ),
    # 384 / 14 leaves 6 px at the right and the bottom that no patch covers.
    "siglip": EncoderEntry(
        SiglipVisionConfig, SiglipVisionModel, -2, 0, None, tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD)
    ),
}


@dataclass(frozen=True)
class Encoder:
    """An encoder of a model: which entry, whose weights.

    Args:
        name: Key of ENCODERS.
        path: Directory or hub id of a vision tower, or of a two-tower checkpoint that holds one.
        layer: Reads another hidden state than the entry says.
    """

    name: str
    path: str
    layer: int | None = None

    def __post_init__(self):
        if self.name not in ENCODERS:
            raise UserError(f"unknown encoder {self.name!r}; registered: {', '.join(ENCODERS)}")

    @property
    def entry(self) -> EncoderEntry:
        return ENCODERS[self.name]

    @property
    def feature_layer(self) -> int:
        return self.entry.layer if self.layer is None else self.layer

    def load_config(self) -> PreTrainedConfig:
        """The vision tower's configuration.

        Raises:
            UserError: The checkpoint at `path` is of another kind than `name` says, or its sizes make no grid.
        """
        found = read_pretrained("model.encoder.path", AutoConfig, self.path)
        found = getattr(found, "vision_config", found)
        same_kind = found.model_type == self.entry.config_class.model_type
        registers, expected = getattr(found, "num_register_tokens", 0), max(self.entry.extra_tokens - 1, 0)
        if same_kind and registers != expected:
            raise UserError(
                f"encoder {self.path!r} has {registers} register tokens, but name {self.name!r} stands for {expected}: "
                "registers would be taken for patches, or patches dropped"
            )
        if found.model_type != self.entry.config_class.model_type:
            raise UserError(
                f"encoder {self.path!r} is a {found.model_type!r} checkpoint, but name {self.name!r} stands for "
                f"{self.entry.config_class.model_type!r}; change model.encoder.name or model.encoder.path"
            )
        config = read_pretrained("model.encoder.path", self.entry.config_class, self.path)
        self.grid(config)
        return config

    def image_px(self, config: PreTrainedConfig) -> int:
        """Side of the square input in pixels."""
        return self.entry.image_px or config.image_size

    def grid(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Patches down and across: image tokens of one image are grid[0] * grid[1]."""
        with error_context(f"encoder {self.path!r}"):
            side = self.image_px(config) // config.patch_size
            if not 1 <= side <= MOST_PATCHES:
                raise UserError(
                    f"patches of {config.patch_size} px make {side} a side of {self.image_px(config)} px; expected "
                    f"1..{MOST_PATCHES}"
                )
        return side, side

    def image_processor(self, config: PreTrainedConfig, image_resize: str) -> LlavaImageProcessorPil:
        """Makes pixels of images: "pad" to a square with the mean colour, or "crop" the centre of the short side's
        square. Source: LLaVA train.py --image_aspect_ratio (stage 1 leaves it at the encoder's own crop)."""
        if image_resize not in ("pad", "center_crop"):
            raise UserError(
                f"unknown image_resize {image_resize!r}; there is pad (stage 2, evaluation) and center_crop (stage 1)"
            )
        side = self.image_px(config)
        return LlavaImageProcessorPil(
            do_pad=image_resize == "pad",
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(self.entry.mean),
            image_std=list(self.entry.std),
        )
