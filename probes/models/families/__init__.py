"""MLLM families: where each keeps its encoder, adapter and LLM, and how it wants an image.

A family is one entry, see :class:`.family.Family`. The encoder's states are what enters the adapter, the adapter's what
the LLM is given at the image positions, both read off the model's own forward.
"""

from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError

from .base import Family
from .deepseek import DEEPSEEK
from .dynamic_resolution import DYNAMIC
from .gemma import GEMMA
from .llava import LLAVA, build_mask, image_attention
from .patch_merging import MERGED

__all__ = ["FAMILIES", "Family", "build_mask", "family_of", "image_attention", "own_image_attention"]

FAMILIES: dict[str, Family] = LLAVA | DEEPSEEK | GEMMA | MERGED | DYNAMIC

_QUERIES = "learned queries gather the image, so that its tokens have no place in it"
_CROSS = "the LLM looks at the image by cross-attention; its sequence has no image tokens"
_TIMM = "its encoder is a timm model, which this environment does not have"
_SEQ2SEQ = "it is an encoder-decoder; image tokens do not run through its decoder"

REFUSED = {
    **dict.fromkeys(("mllama", "idefics", "blip"), _CROSS),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "idefics2", "aria"), _QUERIES),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), _QUERIES),
    **dict.fromkeys(("fast_vlm", "perception_lm", "gemma3n"), _TIMM),
    **dict.fromkeys(("florence2", "udop", "pix2struct", "pp_formulanet", "t5gemma2"), _SEQ2SEQ),
    **dict.fromkeys(("chameleon", "emu3"), "images are words of a codebook; it has neither encoder states nor adapter"),
    "molmo2": "tokens of the whole view see those of its crops, which come later and cannot be left out",
    "fuyu": "it has no encoder: patches are projected straight into the LLM",
}


def family_of(config: PreTrainedConfig) -> Family:
    """The entry for a checkpoint's config.

    Raises:
        UserError: No entry; says why where there can be none, and what one needs elsewhere.
    """
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind in REFUSED:
        raise UserError(f"{kind} cannot be probed patch by patch: {REFUSED[kind]}")
    raise UserError(
        f"no MLLM family {kind!r}; registered: {', '.join(FAMILIES)}. A model whose image tokens lie in the LLM's "
        "sequence needs an entry in probes/families: its class, the input's and a token's size in pixels, the "
        "encoder's width and the adapter's module"
    )


def own_image_attention(config: PreTrainedConfig) -> str:
    """The mask that a checkpoint was trained with: its config's, or its kind's."""
    kind = family_of(config).image_attention
    return getattr(config, "image_attention", None) or (kind if isinstance(kind, str) else kind(config))
