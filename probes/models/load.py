"""Load a checkpoint, or a module, as a frozen MLLM or a frozen vision encoder."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers.utils.hub import resolve_revision

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights

from .attention_masks import check_masks, mask_backend
from .families import family_of, own_image_attention
from .frozen_encoder import FrozenEncoder, check_encoder
from .frozen_mllm import FrozenMLLM
from .module_sources import check_names_function, is_source, open_source
from .own_module import EncoderModule, Preprocess, describe_module
from .pixels import read_image_processors
from .prompts import read_dialogue, read_prefix_ids, read_separator_id
from .random_weights import check_control, check_matches, replace_weights
from .read_config import check_numbers, read_config

IMAGE_FIRST = (
    "no text precedes the image. Under a causal mask its first token can then be the LLM's attention sink, whose state "
    "is the same for any image; use the prefix of the chat template, or measure it by `probes sinks`"
)


def load(
    path: str | nn.Module | EncoderModule,
    image_attention: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    *,
    image_px: int | None = None,
    image_resize: str | None = None,
    revision: str | None = None,
    device_map: str | dict | None = None,
    attn_implementation: str | None = None,
    prefix: str | None = None,
    untrained: Sequence[str] = (),
    match: str = "none",
    draw: int = 0,
    match_images: Sequence[Image.Image] = (),
    update_scales: Sequence[float] | None = None,
    seed: int = 0,
    preprocess: Preprocess | None = None,
    patch: int | None = None,
    layers: Sequence[str] | str | None = None,
    norm: str | None = None,
    parts: Mapping[str, str] | None = None,
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
        image_px: Side of the square input in pixels, of a bare encoder; None: the one that it is published with. An
            MLLM has that of its checkpoint.
        image_resize: How images become squares: "squash", "pad", "center_crop" or "letterbox" (probes/ops/geometry.py).
            None: the checkpoint's own way. Another one replaces its crop, but not its filter.
        revision: Branch, tag or commit of a hub id. The commit is recorded as `FrozenMLLM.revision`.
        device_map: transformers' device map, to spread a model over devices; excludes `device`.
        attn_implementation: transformers' attention backend; None: "sdpa", or "eager" if the LLM does not support it.
            :meth:`FrozenMLLM.attention` needs "sdpa". Backends that ignore masks are rejected.
        prefix: Text before the image. None: the checkpoint's chat template up to the image.
        untrained: Parts to replace by random weights, as controls without training: "adapter", "llm"; of a bare encoder
            "encoder".
        match: How a random LLM or encoder resembles the trained one: "none", "update" or "permuted".
        draw: Number of the draw of random weights, for several controls with one seed.
        match_images: Images on which "update" matches the layers' updates: training images.
        update_scales: The factors of an earlier match (`FrozenMLLM.update_scales`), instead of `match_images`.
        seed: Seed of the random weights.
        preprocess, patch, layers, norm, parts: Of a module, as in :class:`EncoderModule`.

    Raises:
        UserError: The checkpoint is not of a registered family or is damaged, an argument is invalid, or a module does
            not do what is said of it.
    """
    if device is not None and device_map is not None:
        raise UserError("device and device_map exclude each other; pass one of them")
    described = {
        "preprocess": preprocess,
        "patch": patch,
        "layers": layers,
        "norm": norm,
        "parts": parts,
    }
    of_checkpoints = {
        "revision": revision,
        "device_map": device_map,
        "attn_implementation": attn_implementation,
    }
    if isinstance(path, nn.Module | EncoderModule) or is_source(path):
        _check_absent(of_checkpoints, "a module is no checkpoint of transformers")
        encoder = _load_module(
            path, described=described, dtype=dtype, image_px=image_px, image_resize=image_resize
        )
        check_matches(encoder.model.config, match)
        check_control(
            encoder.family,
            parts=untrained,
            match=match,
            images=match_images,
            scales=update_scales,
            draw=draw,
        )
        own = encoder.own_image_attention
        check_encoder(
            "a module", own=own, image_attention=image_attention, prefix=prefix, backend="sdpa"
        )
        encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if untrained:
            replace_weights(
                encoder,
                parts=untrained,
                match=match,
                draw=draw,
                seed=seed,
                images=match_images,
                scales=update_scales,
            )
        return encoder
    check_names_function(path)
    _check_absent(described, f"they are of modules, and {path} is a checkpoint")
    if revision is not None and Path(path).is_dir():
        raise UserError(
            f"revision={revision!r}: {path} is a directory, which has no revisions; leave it out, or pass a hub id"
        )
    # once, so that all files are of the same commit
    hub = {"revision": resolve_revision(path, revision)}
    config = read_config(path, **hub)
    family = family_of(config)
    if image_px is not None:
        family = family.with_side(image_px, config)
    check_control(
        family, parts=untrained, match=match, images=match_images, scales=update_scales, draw=draw
    )
    check_numbers(path, family, config)
    own = own_image_attention(config)
    spread = {} if device_map is None else {"device_map": device_map}
    options = {"dtype": dtype or "auto", **spread}
    if family.has_llm:
        attention = image_attention or own
        backend = attn_implementation or mask_backend(config.get_text_config())
        check_masks(attention, config.get_text_config(), backend)
    else:
        backend = attn_implementation or "sdpa"
        check_encoder(
            path, own=own, image_attention=image_attention, prefix=prefix, backend=backend
        )
    model = load_weights(
        "MLLM",
        family.model_cls,
        path,
        attn_implementation=backend,
        **({} if family.has_llm else family.settings),
        **options,
        **hub,
    )
    processors, rule = read_image_processors(path, family, **hub)
    rule = rule.replaced_by(getattr(config, "image_resize", None)).replaced_by(image_resize)
    commit = getattr(hub["revision"], "resolved", None)
    if family.has_llm:
        ids = read_prefix_ids(path, family=family, prefix=prefix, **hub)
        if not ids and attention == "causal":
            warnings.warn(IMAGE_FIRST, stacklevel=2)
        separator_id = read_separator_id(path, family, **hub)
        chat = partial(read_dialogue, path, family, **hub)
        mllm = FrozenMLLM(
            model=model,
            family=family,
            image_processors=processors,
            prefix_ids=ids,
            image_attention=attention,
            resize_rule=rule,
            separator_id=separator_id,
            revision=commit,
            read_chat=chat,
        )
    else:
        mllm = FrozenEncoder(
            model=model,
            family=family,
            image_processors=processors,
            resize_rule=rule,
            revision=commit,
        )
    if device_map is None:
        mllm.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if untrained:
        replace_weights(
            mllm,
            parts=untrained,
            match=match,
            draw=draw,
            seed=seed,
            images=match_images,
            scales=update_scales,
        )
    return mllm


def _load_module(
    module: nn.Module | EncoderModule | str,
    described: Mapping[str, Any],
    dtype: torch.dtype | str | None,
    image_px: int | None,
    image_resize: str | None,
) -> FrozenEncoder:
    """Return a module as a frozen encoder, on the CPU or where it is; `described` are fields of EncoderModule."""
    given = {name: value for name, value in described.items() if value is not None}
    if isinstance(module, nn.Module):
        if missing := {"preprocess", "patch", "layers"} - given.keys():
            raise UserError(f"to read a module, give {', '.join(sorted(missing))}, too")
        encoder = EncoderModule(module, **given)
    else:
        _check_absent(described, "the EncoderModule says so itself")
        encoder = module if isinstance(module, EncoderModule) else open_source(module, image_px)
    if image_px is not None:
        encoder = replace(encoder, image_px=image_px)
    model, processor = describe_module(encoder)
    if dtype not in (None, "auto"):
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    rule = encoder.resize_rule.replaced_by(image_resize)
    return FrozenEncoder(
        model=model, family=family_of(model.config), image_processors=[processor], resize_rule=rule
    )


def _check_absent(arguments: Mapping[str, Any], why: str) -> None:
    """Raise a UserError that ends with `why` if one of these arguments is given."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise UserError(f"leave out {', '.join(given)}, since {why}")
