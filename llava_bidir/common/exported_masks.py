"""The mask of an export that no file of the user's has registered: its function is in the export's attention.py."""

import runpy
from collections.abc import Mapping
from importlib import import_module
from inspect import getsource
from pathlib import Path
from textwrap import dedent
from typing import Any

from .errors import UserError, error_context
from .imports import HINT, code_of

MASKS = "llava_bidir.model.attention"  # ships inside exports


def register_own_mask(path: str, config: Mapping[str, Any], *, trust: bool, **hub: Any) -> None:
    """Register the mask that a checkpoint's config names by running its attention.py, unless it is registered.

    Args:
        path: Directory or hub id.
        config: Its config.json.
        trust: Whether its code may be run.
        **hub: `revision` of a hub id.

    Raises:
        UserError: It may not be run or cannot be, or the name is registered for another function.
    """
    from transformers.utils.hub import cached_file

    if not has_own_mask(config):
        return
    file = cached_file(path, "attention.py", _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        return  # its config says which masks there are
    masks = import_module(MASKS)
    name = config["image_attention"]
    if registered := masks.IMAGE_ATTENTION.get(name):
        if dedent(getsource(registered)) not in Path(file).read_text():
            raise UserError(
                f"{file} has another function for image_attention {name!r} than the one that is registered; run "
                "models of two masks with one name in two commands"
            )
        return
    if not trust:
        raise UserError(
            f"its image_attention {name!r} is a function in {file}. Read it, then allow it: --trust true (of `probes "
            f"fit` --model.trust, in Python trust=True); or {HINT}"
        )
    with error_context(file), code_of(file):
        masks.register_image_attention(name, runpy.run_path(file)["IMAGE_ATTENTION"][name])


def has_own_mask(config: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's config.json names a mask that this package's attention.py does not have."""
    masks = import_module(MASKS).IMAGE_ATTENTION
    name = config.get("image_attention", "causal")
    return name not in masks or getattr(masks[name], "__module__", MASKS) != MASKS
