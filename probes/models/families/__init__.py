"""Families of models: where their modules are, and the image format.

One :class:`.base.Family` per kind of MLLM, one :class:`.encoders.EncoderFamily` per kind of bare vision encoder.
"""

from transformers import PreTrainedConfig

from llava_bidir.common.encoders import ENCODERS as ENCODER_KINDS
from llava_bidir.common.encoders import vision_config
from llava_bidir.common.errors import UserError
from llava_bidir.common.imports import HINT
from probes.ops.geometry import SLIDE

from .base import Family as Family
from .base import square_side
from .deepseek import DEEPSEEK
from .dynamic_resolution import DYNAMIC
from .encoders import ENCODERS, AnyFamily, family_of_kind
from .encoders import EncoderFamily as EncoderFamily
from .gemma import GEMMA
from .llava import LLAVA
from .modules import MODULE_FAMILY, MODULE_TYPE
from .patch_merging import PATCH_MERGING

FAMILIES: dict[str, AnyFamily] = LLAVA | DEEPSEEK | GEMMA | PATCH_MERGING | DYNAMIC | ENCODERS

_QUERIES = "learned queries summarise the image, so that its tokens have no position in it"
_CROSS = "the LLM reads the image by cross-attention; its sequence has no image tokens"
_TIMM = "its encoder is a model of timm, which is read by itself only (timm:NAME)"
_SEQ2SEQ = "it is an encoder-decoder; image tokens do not pass through its decoder"

UNSUPPORTED = {
    **dict.fromkeys(("mllama", "idefics", "blip"), _CROSS),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "idefics2", "aria"), _QUERIES),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), _QUERIES),
    **dict.fromkeys(("fast_vlm", "perception_lm", "gemma3n"), _TIMM),
    **dict.fromkeys(("florence2", "udop", "pix2struct", "pp_formulanet", "t5gemma2"), _SEQ2SEQ),
    **dict.fromkeys(
        ("chameleon", "emu3"),
        "images are tokens of a codebook; it has neither encoder states nor adapter",
    ),
    "hunyuan_vl": "begin, newlines and end of the image have the id of its tokens, which are no grid",
    "granite_docling": "a router decides by the image's content how many tokens it has",
    "llama4": "its decoder is a model with a head of its own, at another place than in all other families",
    "molmo2": "tokens of the full view attend to those of its crops, which come later and cannot be left out",
    "fuyu": "it has no encoder: patches are projected directly into the LLM",
}


def register_family(model_type: str, family: AnyFamily) -> None:
    """Add a family, so that :func:`probes.load` reads checkpoints whose config has this `model_type`.

    Raises:
        UserError: The model type is registered already.
    """
    if model_type in FAMILIES:
        raise UserError(f"family {model_type!r} is registered already; choose another model_type")
    FAMILIES[model_type] = family


def family_of(config: PreTrainedConfig) -> AnyFamily:
    """Return the family of a checkpoint's config; raise a UserError if it is not registered or cannot be probed."""
    kind = config.model_type
    if kind == MODULE_TYPE:  # which no checkpoint is of
        return MODULE_FAMILY
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind in ENCODER_KINDS:  # registered since
        return family_of_kind(ENCODER_KINDS[kind])
    if kind == "timm_wrapper":
        raise UserError("it is a model of timm: read it as timm:local-dir:DIR, or timm:hf-hub:ID")
    if kind in UNSUPPORTED:
        raise UserError(f"{kind} cannot be probed patch by patch: {UNSUPPORTED[kind]}")
    if _is_encoder(config):
        raise UserError(
            f"{kind} is a vision encoder that is not registered; registered: {', '.join(ENCODERS)}. Add it with "
            f"probes.register_family and a probes.EncoderFamily: class, layers, norm, tokens before the patches. {HINT}"
        )
    raise UserError(
        f"no MLLM or encoder family {kind!r}; registered: {', '.join(FAMILIES)}. If image tokens are in the sequence "
        "of its LLM, add it with probes.register_family and a probes.Family: class, input and token size in pixels, "
        f"encoder width, adapter module. {HINT}"
    )


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Return whether a config is that of a model that reads patches of images, and no text."""
    has_patches = hasattr(config, "patch_size") and hasattr(config, "image_size")
    return has_patches and not hasattr(config, "text_config") and not hasattr(config, "vocab_size")


def own_image_attention(config: PreTrainedConfig) -> str:
    """Return the mask that a checkpoint was trained with, from its config or its family."""
    attention = family_of(config).image_attention
    if not isinstance(attention, str):
        attention = attention(config)
    return getattr(config, "image_attention", None) or attention


def sized_family(
    family: AnyFamily, config: PreTrainedConfig, image_px: int, image_resize: str | None
) -> AnyFamily:
    """Return the family of a bare encoder for another side of its square.

    A window of any side is the middle of a square of the next multiple of the patch, as in DINOv2's evaluation.

    Raises:
        UserError: The model takes no input of this side.
    """
    if image_resize == SLIDE and not family.has_llm:
        patch = square_side(vision_config(config).patch_size)
        image_px = -(-image_px // patch) * patch
    return family.with_side(image_px, config)
