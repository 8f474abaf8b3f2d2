"""Attention cut inside a vision encoder, bare or of an MLLM.

A knockout at the site "encoder" leaves a patch itself, and of the other patches those that are not blocked. CLS and
registers attend to all tokens as before, so that what they tell the patches of the next layer is of the whole picture;
without `keep_extra`, patches do not attend to them. Eq. 1 in a bare encoder takes a blocked patch from itself, too.

Shapes: B images, T image tokens, P patches, N tokens (extra tokens, then patches), L layers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError

from .attention_masks import is_allowed, mask_values, supports_masks
from .attention_weights import softmax_attention
from .families.encoder_layers import WINDOWS, encoder_layers
from .families.encoders import ENCODERS, AnyFamily, count_extra_tokens, vision_config
from .families.modules import MODULE_TYPE
from .hooks import at_output, with_arguments
from .knockout import PREFIX, Knockout
from .sites import ENCODER

BACKENDS = ("sdpa", "eager")  # that apply masks
NO_MASK = ("data2vec-vision",)  # whose attention is code of its own
TILED = (  # of a photo, which are not run here
    "llava_next llava_onevision internvl qianfan_ocr smolvlm idefics3 aya_vision cohere2_vision ovis2 lfm2_vl"
).split()


def check_cut(family: AnyFamily, config: PreTrainedConfig) -> None:
    """Raise a UserError that says why the encoder of a model cannot be cut, as far as its config says."""
    vision = vision_config(config)
    kind = vision.model_type
    why = ""
    if kind in WINDOWS:
        why = "its patches attend within windows"
    elif getattr(vision, "deepstack_visual_indexes", None):
        why = "features of its layers enter the LLM beside the adapter's (DeepStack)"
    elif config.model_type in TILED:
        why = "photos are tiles for this model, and only the view of the whole is read here"
    elif kind in NO_MASK or (family.has_llm and kind not in ENCODERS):
        why = "its attention is not known to take a mask"
    if why:
        raise UserError(f"the encoder of {config.model_type} ({kind}) cannot be cut: {why}")
    if family.has_llm:
        encoder_layers(
            family, config
        )  # an error if its patches are not on the grid of the image tokens


class ModelCut(NamedTuple):
    """Where patches see only themselves in every forward of a model."""

    encoder: Knockout | None = None
    llm: bool = False


_ENCODER = Knockout(site=ENCODER)
_ALONE = Knockout(site=ENCODER, keep_extra=False)
MODEL_CUTS = {
    "encoder": ModelCut(_ENCODER),
    "encoder_alone": ModelCut(_ALONE),
    "llm": ModelCut(llm=True),
    "both": ModelCut(_ENCODER, llm=True),
    "both_alone": ModelCut(_ALONE, llm=True),
}


def check_model_cut(cut: str | None, family: AnyFamily, config: PreTrainedConfig) -> None:
    """Raise a UserError if a model cannot have a cut, None or a key of `MODEL_CUTS`, as far as its config says."""
    if cut is None:
        return
    if cut not in MODEL_CUTS:
        raise UserError(f"there is no cut {cut!r}; expected one of {', '.join(MODEL_CUTS)}")
    if MODEL_CUTS[cut].encoder:
        check_cut(family, config)
    if not MODEL_CUTS[cut].llm:
        return
    if not family.has_llm:
        raise UserError(f"cut {cut!r}: {config.model_type} has no LLM; expected encoder")
    if not supports_masks(config.get_text_config()):
        raise UserError(f"cut {cut!r}: layers of {config.model_type}'s LLM have no mask")


def extra_tokens(family: AnyFamily, config: PreTrainedConfig) -> int:
    """Return the number of tokens before the patches in the encoder of a model."""
    if family.has_llm:
        return encoder_layers(family, config).extra_tokens
    return count_extra_tokens(family, vision_config(config))


def set_cut(model: nn.Module, cut: str) -> None:
    """Cut every forward of a :class:`FrozenModel`; raise a UserError if a layer has no attention that can be cut."""
    model.encoder_cut, model.cuts_llm = MODEL_CUTS[cut]
    if model.encoder_cut:
        for layer in PatchEncoder.of(model).layers:
            masked_attention(layer, vision_config(model.model.config))


@dataclass(frozen=True)
class PatchEncoder:
    """The encoder of a model.

    Args:
        layers: Its layers.
        extra_tokens: Number of tokens before the patches.
        token_of_patch: i64[P], the image token that a patch is of.
        config: Of the vision model.
        dtype: Of the model.
    """

    layers: nn.ModuleList
    extra_tokens: int
    token_of_patch: Tensor
    config: PreTrainedConfig
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> "PatchEncoder":
        """Return the encoder of a :class:`FrozenModel`."""
        config = model.model.config
        layers = model.layers
        extra = len(model.is_image) - model.image_tokens
        token_of_patch = torch.arange(model.image_tokens)
        if model.has_llm:
            parts = model.encoder_layers
            layers = parts.modules(model.model)
            extra = parts.extra_tokens
            token_of_patch = parts.token_of_patch()
        return cls(layers, extra, token_of_patch, vision_config(config), model.model.dtype)

    def allowed(self, knockout: Knockout, images: int) -> Tensor:
        """Return which tokens each one may attend to, bool[B, 1, N, N]; B is 1 if all patches are blocked."""
        patches = len(self.token_of_patch)
        blocked = torch.ones(1, patches, dtype=torch.bool)
        if knockout.blocked is not None:
            tokens = int(self.token_of_patch.max()) + 1
            blocked = knockout.check_blocked(images, tokens).cpu()[:, self.token_of_patch]
        first = self.extra_tokens
        allowed = torch.ones(len(blocked), first + patches, first + patches, dtype=torch.bool)
        allowed[:, first:, :first] = knockout.keep_extra
        allowed[:, first:, first:] = ~blocked[:, None] | torch.eye(patches, dtype=torch.bool)
        return allowed[:, None]


@contextmanager
def cut_encoder(
    model: nn.Module, knockout: Knockout | None, images: int
) -> Iterator[Knockout | None]:
    """Cut the encoder of a :class:`FrozenModel` while the context is open, by its own cut and by a knockout there.

    Yield the knockout if it is in the model's layers, else None.

    Raises:
        UserError: The encoder cannot be cut, or the knockout does not fit.
    """
    cuts = [model.encoder_cut]
    if knockout and knockout.in_encoder:
        cuts.append(knockout)
        knockout = None
    with ExitStack() as stack:
        for cut in filter(None, cuts):
            check_cut(model.family, model.model.config)
            encoder = PatchEncoder.of(model)
            allowed = encoder.allowed(cut, images)
            chosen = cut.select_layers(encoder.layers, len(allowed))
            stack.enter_context(
                cut_layers(encoder, allowed.to(model.device), chosen.to(model.device))
            )
        yield knockout


@contextmanager
def cut_patches(model: nn.Module, knockout: Knockout, images: int) -> Iterator[None]:
    """Cut the attention among patches of a bare encoder by Eq. 1 while the context is open.

    Raises:
        UserError: The knockout does not fit, or a layer has no attention that can be cut.
    """
    if model.model.config.model_type == MODULE_TYPE:
        raise UserError(
            "knockouts cut the attention of models of transformers; that of a module of your own is not known"
        )
    if PREFIX in (*knockout.names("rows"), *knockout.names("columns")):
        raise UserError(
            "a vision encoder has no prefix; cut attention between 'image' and 'blocked'"
        )
    tokens = len(model.is_image)
    everything = torch.ones(images, 1, tokens, tokens, dtype=torch.bool, device=model.device)
    allowed = knockout.cut(everything, model.is_image)
    chosen = knockout.select_layers(model.layers, images).to(model.device)
    knockout.check_effect((~allowed).flatten(1).any(1), chosen.any(1))
    with cut_layers(PatchEncoder.of(model), allowed, chosen):
        yield


@contextmanager
def cut_layers(encoder: PatchEncoder, allowed: Tensor, chosen: Tensor) -> Iterator[None]:
    """Give layers of an encoder a mask while the context is open.

    Args:
        encoder: The encoder.
        allowed: bool[B or 1, 1, N, N].
        chosen: bool[B or 1, L], the layers that are cut.

    Raises:
        UserError: A layer has no attention that can be cut.
        RuntimeError: A layer ran without it.
    """
    backend = encoder.config._attn_implementation
    if backend not in BACKENDS and encoder.config.model_type != MODULE_TYPE:
        raise UserError(
            f"attn_implementation {backend!r} ignores the masks of knockouts; use {' or '.join(BACKENDS)}"
        )
    reached: set[int] = set()

    def give(index: int, name: str, mask: Tensor, arguments: dict) -> dict:
        reached.add(index)
        return {name: combined(mask, arguments.get(name))}

    def check(index: int, states: Tensor) -> None:
        if index not in reached:
            raise RuntimeError(f"layer {index + 1} of the encoder ran without its cut attention")

    with ExitStack() as stack:
        for index, (layer, in_rows) in enumerate(zip(encoder.layers, chosen.T, strict=True)):
            if not in_rows.any():
                continue
            attention, name = masked_attention(layer, encoder.config)
            mask = allowed | ~in_rows[:, None, None, None]
            if backend == "eager" or name != "attention_mask":  # it is added to the scores
                values = mask_values(encoder.dtype)
                mask = torch.where(mask, *(torch.tensor(x, dtype=encoder.dtype) for x in values))
            stack.enter_context(with_arguments(attention, partial(give, index, name, mask)))
            stack.enter_context(at_output(layer, partial(check, index)))
        yield


def masked_attention(layer: nn.Module, config: PreTrainedConfig) -> tuple[nn.Module, str]:
    """Return the attention of a layer, and the argument that is its mask.

    Raises:
        UserError: It takes no mask.
    """
    attention = softmax_attention(layer)
    name = "attention_mask"
    if config.model_type == MODULE_TYPE:  # in torch's own attention, True of a mask forbids
        attention = getattr(layer, "attn", None)
        name = "attn_mask"
        if not type(attention).__module__.startswith("timm."):
            attention = None
    if attention is None or name not in signature(attention.forward).parameters:
        raise UserError(f"{type(layer).__name__} has no attention that a knockout can cut")
    return attention, name


def combined(mask: Tensor, given: Tensor | None) -> Tensor:
    """Return a mask that allows what two allow; `given` can be BEiT's bias of relative positions, for the scores."""
    if given is None:
        return mask
    if given.dtype == torch.bool:
        return mask & given
    return torch.where(is_allowed(mask), given, -torch.inf)
