"""Attention cut inside a vision encoder, bare or of an MLLM.

A knockout at the site "encoder" leaves a patch itself, and of the other patches those that are not blocked. CLS and
registers attend to all tokens as before, so that what they tell the patches of the next layer is of the whole picture;
without `keep_extra`, patches do not attend to them. Eq. 1 in a bare encoder takes a blocked patch from itself, too.

Shapes: B images, P patches, N tokens (extra tokens, then patches), L layers.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.encoders import ENCODERS, count_extra_tokens, vision_config
from llava_bidir.common.errors import UserError
from probes.config import Cut

from .attention_masks import is_allowed, mask_values, supports_masks
from .attention_weights import softmax_attention
from .families.encoder_layers import WINDOWS, encoder_layers
from .families.encoders import AnyFamily
from .families.modules import MODULE_TYPE
from .hooks import at_output, with_arguments
from .knockout import PREFIX, Knockout
from .sites import ENCODER

LLM_CUTS = ("llm", "both", "both_alone")
NO_MASK = ("data2vec-vision",)  # whose attention is code of its own
TILED = (  # of a photo, which are not run here
    "llava_next llava_onevision internvl qianfan_ocr smolvlm idefics3 aya_vision cohere2_vision ovis2 lfm2_vl"
).split()


def check_cut(cut: str | None, family: AnyFamily, config: PreTrainedConfig) -> None:
    """Raise a UserError that says why a model cannot have a cut, as far as its config says; None cuts nothing."""
    if cut is None:
        return
    vision = vision_config(config)
    whole = f"{config.model_type} ({vision.model_type}) cannot have cut {cut!r}"
    if cut not in get_args(Cut):
        raise UserError(f"there is no cut {cut!r}; expected one of {', '.join(get_args(Cut))}")
    if cut in LLM_CUTS and not (family.has_llm and supports_masks(config.get_text_config())):
        raise UserError(f"{whole}: it has no LLM, or one with layers without masks")
    if cut == "llm":
        return
    why = ""
    if vision.model_type in WINDOWS:
        why = "its patches attend within windows"
    elif getattr(vision, "deepstack_visual_indexes", None):
        why = "features of its encoder's layers enter the LLM beside the adapter's (DeepStack)"
    elif config.model_type in TILED:
        why = "photos are tiles for it, and only the view of the whole is read here"
    elif vision.model_type in NO_MASK or (family.has_llm and vision.model_type not in ENCODERS):
        why = "its encoder's attention is not known to take a mask"
    if why:
        raise UserError(f"{whole}: {why}")
    if family.has_llm:
        # an error if its patches are not on the grid of the image tokens
        encoder_layers(family, config)


def extra_tokens(family: AnyFamily, config: PreTrainedConfig) -> int:
    """Return the number of tokens before the patches in the encoder of a model."""
    if family.has_llm:
        return encoder_layers(family, config).extra_tokens
    return count_extra_tokens(family, vision_config(config))


@contextmanager
def cut_encoder(
    model: nn.Module, knockout: Knockout | None, images: int
) -> Iterator[Knockout | None]:
    """Cut the encoder of a :class:`FrozenModel` while the context is open, as `model.cut` and a knockout say.

    Yield the knockout if it is of an LLM's layers, else None.

    Raises:
        UserError: The encoder cannot be cut, or the knockout does not fit.
    """
    cuts = []
    if model.cut not in (None, "llm"):
        cuts.append(Knockout(site=ENCODER, keep_extra=not model.cut.endswith("_alone")))
    if knockout and (knockout.in_encoder or not model.has_llm):
        cuts.append(knockout)
        knockout = None
    with ExitStack() as stack:
        for cut in cuts:
            if cut.in_encoder:
                allowed = allowed_to_patches(model, cut, images)
            else:
                allowed = allowed_by_eq1(model, cut, images)
            layers = layers_of_encoder(model)
            chosen = cut.select_layers(layers, len(allowed))
            cut.check_effect((~allowed).flatten(1).any(1).cpu(), chosen.any(1))
            stack.enter_context(cut_layers(model, layers, allowed=allowed, chosen=chosen))
        yield knockout


def layers_of_encoder(model: nn.Module) -> nn.ModuleList:
    """Return the layers of the encoder of a :class:`FrozenModel`."""
    if model.has_llm:
        return model.encoder_layers.modules(model.model)
    return model.layers


def allowed_to_patches(model: nn.Module, knockout: Knockout, images: int) -> Tensor:
    """Return which tokens each one may attend to, bool[B, 1, N, N]; B is 1 if all patches are blocked."""
    config = model.model.config
    check_cut("encoder", model.family, config)
    token_of_patch = torch.arange(model.image_tokens)
    if model.has_llm:
        token_of_patch = model.encoder_layers.token_of_patch()
    blocked = torch.ones(1, model.image_tokens, dtype=torch.bool)
    if knockout.blocked is not None:
        blocked = knockout.check_blocked(images, model.image_tokens).cpu()
    blocked = blocked[:, token_of_patch]
    first = extra_tokens(model.family, config)
    tokens = first + len(token_of_patch)
    allowed = torch.ones(len(blocked), 1, tokens, tokens, dtype=torch.bool)
    allowed[..., first:, :first] = knockout.keep_extra
    itself = torch.eye(len(token_of_patch), dtype=torch.bool)
    allowed[..., first:, first:] = ~blocked[:, None, None] | itself
    return allowed


def allowed_by_eq1(model: nn.Module, knockout: Knockout, images: int) -> Tensor:
    """Return which tokens of a bare encoder each one may attend to, bool[B, 1, N, N]."""
    if PREFIX in (*knockout.names("rows"), *knockout.names("columns")):
        raise UserError(
            "a vision encoder has no prefix; cut attention between 'image' and 'blocked'"
        )
    tokens = len(model.is_image)
    everything = torch.ones(images, 1, tokens, tokens, dtype=torch.bool, device=model.device)
    return knockout.cut(everything, model.is_image)


@contextmanager
def cut_layers(
    model: nn.Module, layers: nn.ModuleList, allowed: Tensor, chosen: Tensor
) -> Iterator[None]:
    """Give layers of an encoder a mask while the context is open.

    Args:
        model: The :class:`FrozenModel`.
        layers: The encoder's.
        allowed: bool[B or 1, 1, N, N].
        chosen: bool[B or 1, L], the layers that are cut.

    Raises:
        UserError: A layer has no attention that can be cut.
        RuntimeError: A layer ran without it.
    """
    config = vision_config(model.model.config)
    reached: set[int] = set()

    def give(index: int, name: str, mask: Tensor, arguments: dict) -> dict:
        reached.add(index)
        return {name: combined(mask, arguments.get(name))}

    def check(index: int, states: Tensor) -> None:
        if index not in reached:
            raise RuntimeError(f"layer {index + 1} of the encoder ran without its cut attention")

    with ExitStack() as stack:
        for index, (layer, in_rows) in enumerate(zip(layers, chosen.T, strict=True)):
            if not in_rows.any():
                continue
            attention, name = masked_attention(layer, config)
            mask = (allowed | ~in_rows.to(allowed.device)[:, None, None, None]).to(model.device)
            if config._attn_implementation == "eager" or name == "attn_mask":  # added to the scores
                dtype = model.model.dtype
                mask = torch.zeros(mask.shape, dtype=dtype, device=model.device).masked_fill(
                    ~mask, mask_values(dtype)[1]
                )
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
    if config.model_type == MODULE_TYPE:
        attention = getattr(layer, "attn", None)
        name = "attn_mask"
        if not type(attention).__module__.startswith("timm."):  # True of torch's own masks forbids
            raise UserError(
                "knockouts cut the attention of models of transformers and timm; that of a module of your own is not "
                "known"
            )
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
