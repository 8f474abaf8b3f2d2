"""Load a checkpoint, or a module, as a frozen MLLM or a frozen vision encoder."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import resolve_revision

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights
from probes.ops.geometry import Geometry, ResizeRule

from .attention_masks import check_masks, mask_backend
from .encoder_cut import check_cut, cut_encoder
from .families import family_of, own_image_attention, sized_family
from .frozen_encoder import FrozenEncoder, check_encoder
from .frozen_mllm import FrozenMLLM
from .module_sources import check_names_function, is_source, open_source
from .own_module import EncoderModule, Preprocess, describe_module
from .pixels import geometry_of, read_image_processors
from .prompts import read_dialogue, read_prefix_ids, read_separator_id
from .random_weights import Control
from .read_config import Checkpoint, check_numbers, read_config

IMAGE_FIRST = (
    "no text precedes the image. Under a causal mask its first token can then be the LLM's attention sink, whose state "
    "is the same for any image; use the prefix of the chat template, or measure it by `probes sinks`"
)
OF_MODULES = ("preprocess", "patch", "layers", "norm", "parts")  # options
OF_CHECKPOINTS = ("revision", "device_map", "attn_implementation")


def load(
    path: str | nn.Module | EncoderModule,
    image_attention: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> FrozenMLLM | FrozenEncoder:
    """Load a checkpoint as a :class:`FrozenMLLM`, or a bare vision encoder or a module as a :class:`FrozenEncoder`.

    Args:
        path: Directory or hub id of a checkpoint of ours or of a registered family (probes/models/families). Or a
            module, of which a copy is made, or an :class:`EncoderModule`; or "timm:NAME" or "FILE.py:FUNCTION"
            (module_sources.py).
        image_attention: Mask among image tokens: "causal", "bidirectional", "prefix" or a registered one. None: the
            mask that the checkpoint was trained with.
        dtype: dtype of the weights, e.g. "bfloat16" or torch.bfloat16. None or "auto": the checkpoint's.
        device: None: the GPU if there is one, else the CPU.
        **options: Fields of :class:`LoadOptions`: image_px, image_resize, stride_px, revision, device_map,
            attn_implementation, prefix, trust, cut; of random weights untrained, match, draw, match_images,
            update_scales, seed; of a module preprocess, patch, layers, norm, parts.

    Raises:
        UserError: The checkpoint is not of a registered family or is damaged, an argument is invalid, or a module does
            not do what is said of it.
    """
    chosen = LoadOptions(image_attention=image_attention, dtype=dtype, **options)
    if device is not None and chosen.device_map is not None:
        raise UserError("device and device_map exclude each other; pass one of them")
    if isinstance(path, nn.Module | EncoderModule) or is_source(path):
        model = load_module(path, chosen)
    else:
        model = load_checkpoint(path, chosen)
    if chosen.device_map is None:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.cut:
        model.cut = chosen.cut
        # an error if a layer has no attention that can be cut
        with cut_encoder(model, None, images=1):
            pass
    if chosen.untrained:
        chosen.replace_weights(model)
    return model


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Control):
    """Options of :func:`load`: those of a :class:`.random_weights.Control`, and how a checkpoint or a module is read.

    Args:
        image_attention, dtype: As of :func:`load`.
        image_px: Side of the square input in pixels, of a bare encoder; None: the one that it is published with. An
            MLLM has that of its checkpoint.
        image_resize: How images become squares: "squash", "pad", "center_crop", "letterbox" or, several of an image,
            "slide" (probes/ops/geometry.py). None: the checkpoint's own way. Another one replaces its crop, but not its
            filter.
        stride_px: From one window of "slide" to the next; None: two thirds of the side.
        revision: Branch, tag or commit of a hub id. The commit is recorded as `FrozenMLLM.revision`.
        device_map: transformers' device map, to spread a model over devices; excludes `device`.
        attn_implementation: transformers' attention backend; None: "sdpa", or "eager" if the LLM does not support it.
            :meth:`FrozenMLLM.attention` needs "sdpa". Backends that ignore masks are rejected.
        prefix: Text before the image. None: the checkpoint's chat template up to the image.
        trust: Whether a mask of the checkpoint's own, in its attention.py, may be run.
        cut: Where patches see only themselves in every forward: as `probes.config.Cut` names it, or None.
        preprocess, patch, layers, norm, parts: Of a module, as in :class:`EncoderModule`.
    """

    image_attention: str | None = None
    dtype: torch.dtype | str | None = None
    image_px: int | None = None
    image_resize: str | None = None
    stride_px: int | None = None
    revision: str | None = None
    device_map: str | dict | None = None
    attn_implementation: str | None = None
    prefix: str | None = None
    trust: bool = False
    cut: str | None = None
    preprocess: Preprocess | None = None
    patch: int | None = None
    layers: Sequence[str] | str | None = None
    norm: str | None = None
    parts: Mapping[str, str] | None = None

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """Return those of some options that are not None."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def resize_rule(self, rule: ResizeRule) -> ResizeRule:
        """Return the rule by which images become squares, from that of a checkpoint or a module."""
        return rule.replaced_by(self.image_resize, self.image_px, self.stride_px)

    def check_absent(self, names: Sequence[str], why: str) -> None:
        """Raise a UserError that ends with `why` if one of these options is given."""
        if given := self.given(names):
            raise UserError(f"leave out {', '.join(given)}, since {why}")


# ------------------------------------------------------------------------------------------------ modules
def load_module(module: nn.Module | EncoderModule | str, options: LoadOptions) -> FrozenEncoder:
    """Return a module, or the one that a source names, as a frozen encoder with its weights, where they are."""
    options.check_absent(OF_CHECKPOINTS, "a module is no checkpoint of transformers")
    encoder = _encoder_module(module, options)
    model, processor = describe_module(encoder)
    dtype = options.dtype
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if isinstance(dtype, torch.dtype):
        model = model.to(dtype)
    family = family_of(model.config)
    rule = options.resize_rule(encoder.resize_rule)
    frozen = FrozenEncoder(model, family, image_processors=[processor], resize_rule=rule)
    options.check_control(family, model.config)
    check_cut(options.cut, family, model.config)
    check_encoder(
        "a module",
        trained_with=family.image_attention,
        image_attention=options.image_attention,
        prefix=options.prefix,
        backend="sdpa",
    )
    return frozen


def _encoder_module(module: nn.Module | EncoderModule | str, options: LoadOptions) -> EncoderModule:
    """Return what is said of a module, by itself or by `options`."""
    if isinstance(module, nn.Module):
        described = options.given(OF_MODULES)
        if missing := {"preprocess", "patch", "layers"} - described.keys():
            raise UserError(f"to read a module, give {', '.join(sorted(missing))}, too")
        encoder = EncoderModule(module, **described)
    else:
        options.check_absent(OF_MODULES, "the EncoderModule says so itself")
        encoder = module
        if not isinstance(module, EncoderModule):
            encoder = open_source(module, options.image_px)
    if options.image_px is None:
        return encoder
    return replace(encoder, image_px=options.image_px)


# -------------------------------------------------------------------------------------------- checkpoints
def load_checkpoint(path: str, options: LoadOptions) -> FrozenMLLM | FrozenEncoder:
    """Return a checkpoint as a frozen model with its weights, on the CPU or spread over devices."""
    checkpoint = open_checkpoint(path, options)
    options.check_control(checkpoint.family, checkpoint.config)
    check_cut(options.cut, checkpoint.family, checkpoint.config)
    check_numbers(path, checkpoint.family, checkpoint.config)
    if checkpoint.family.has_llm:
        model = _load_mllm(checkpoint, options)
    else:
        model = _load_encoder(checkpoint, options)
    model.revision = getattr(checkpoint.revision, "resolved", None)
    return model


def open_checkpoint(path: str, options: LoadOptions) -> Checkpoint:
    """Return a checkpoint before its weights are read."""
    check_names_function(path)
    options.check_absent(OF_MODULES, f"they are of modules, and {path} is a checkpoint")
    if options.revision is not None and Path(path).is_dir():
        raise UserError(
            f"revision={options.revision!r}: {path} is a directory, which has no revisions; leave it out, or pass a "
            "hub id"
        )
    # once, so that all files are of the same commit
    revision = resolve_revision(path, options.revision)
    config = read_config(path, revision, trust=options.trust)
    family = family_of(config)
    if options.image_px is not None:
        family = sized_family(family, config, options.image_px, options.image_resize)
    return Checkpoint(path, family=family, config=config, revision=revision)


def read_geometry(path: str, **options: Any) -> Geometry:
    """Return how a checkpoint sees images, as :func:`load` does with these options. No weights are read."""
    chosen = LoadOptions(**options)
    checkpoint = open_checkpoint(path, chosen)
    processors, rule = read_image_processors(checkpoint)
    rule = chosen.resize_rule(rule)
    return geometry_of(checkpoint.family, checkpoint.config, processors, rule)


def _load_mllm(checkpoint: Checkpoint, options: LoadOptions) -> FrozenMLLM:
    text_config = checkpoint.config.get_text_config()
    attention = options.image_attention or own_image_attention(checkpoint.config)
    backend = options.attn_implementation or mask_backend(text_config)
    check_masks(attention, text_config, backend)
    model = _load_weights(checkpoint, options, attn_implementation=backend)
    processors, rule = read_image_processors(checkpoint)
    prefix_ids = read_prefix_ids(checkpoint, options.prefix)
    if not prefix_ids and attention == "causal":
        warnings.warn(IMAGE_FIRST, stacklevel=4)  # of the caller of `load`
    return FrozenMLLM(
        model,
        checkpoint.family,
        image_processors=processors,
        prefix_ids=prefix_ids,
        image_attention=attention,
        resize_rule=options.resize_rule(rule),
        separator_id=read_separator_id(checkpoint),
        read_chat=partial(read_dialogue, checkpoint),
    )


def _load_encoder(checkpoint: Checkpoint, options: LoadOptions) -> FrozenEncoder:
    family = checkpoint.family
    backend = options.attn_implementation or "sdpa"
    check_encoder(
        checkpoint.path,
        trained_with=family.image_attention,
        image_attention=options.image_attention,
        prefix=options.prefix,
        backend=backend,
    )
    settings = {"attn_implementation": backend, **family.settings}
    model = _load_weights(checkpoint, options, **settings)
    processors, rule = read_image_processors(checkpoint)
    return FrozenEncoder(
        model, family, image_processors=processors, resize_rule=options.resize_rule(rule)
    )


def _load_weights(checkpoint: Checkpoint, options: LoadOptions, **settings: Any) -> PreTrainedModel:
    """Return the model of transformers."""
    return load_weights(
        "MLLM",
        checkpoint.family.model_cls,
        checkpoint.path,
        dtype=options.dtype or "auto",
        revision=checkpoint.revision,
        **options.given(["device_map"]),
        **settings,
    )
