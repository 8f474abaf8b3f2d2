"""Models that are no checkpoints, as commands name them: "timm:NAME", and "FILE.py:FUNCTION" of one's own.

The function takes no arguments and returns a `probes.EncoderModule`. Its file runs as a script does, with all that it
imports: name only files that you have read. Checkpoints, hub ids and models of timm run no code of theirs. A finished
run names its model, too, and may come from someone else: a file is run for it only if you have named this file with
this content in a command, or in `probes.load`, before.
"""

import hashlib
import os
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.identity import DIGITS

from .families.modules import ModuleConfig
from .own_module import EncoderModule, describe_module
from .source_names import TIMM, is_source, split_source
from .timm_models import load_timm

OWN_FILES = "own_files"  # folder in the cache, of names that are digests of files that were run


def absolute_source(path: str) -> str:
    """Return a source whose file has an absolute path, so that it is found from any directory."""
    if path.startswith(TIMM):
        return path
    file, function = split_source(path)
    return f"{file.resolve()}:{function}"


def open_source(path: str, image_px: int | None = None) -> EncoderModule:
    """Return the module that a source names.

    Args:
        path: Source, see :func:`is_source`.
        image_px: Side of the square input; None for the module's own.

    Raises:
        UserError: timm or the model is not there, or the file cannot be run or returns something else.
    """
    if path.startswith(TIMM):
        return load_timm(path.removeprefix(TIMM), image_px)
    file, name = split_source(path)
    content = _read(file)
    _remember(file, content)
    with error_context(path):
        function = getattr(_run(file, content), name, None)
        if not callable(function):
            raise UserError(f"{file} has no function {name!r}")
        encoder = function()
        if not isinstance(encoder, EncoderModule):
            raise UserError(
                f"{name}() returned a {type(encoder).__name__}; expected a probes.EncoderModule"
            )
    return encoder if image_px is None else replace(encoder, image_px=image_px)


def module_config(path: str) -> ModuleConfig:
    """Return the config of the module that a source names."""
    return _describe(path, _version(path))[0]


def source_identity(path: str) -> str | dict[str, str]:
    """Return what identifies the model that a source names: its file and its weights; a checkpoint's path as it is."""
    return _describe(path, _version(path))[1] if is_source(path) else path


def check_was_run(path: str, source: str) -> None:
    """Raise a UserError if a finished run, `source`, names a file that has not been run at the user's own wish."""
    if not is_source(path) or path.startswith(TIMM):
        return
    file, _ = split_source(path)
    if not _mark(file, _read(file)).is_file():
        raise UserError(
            f"{source} is of {path}, a file with code that you have not run here, or not with this content. "
            f"Read it, then allow it: probes sites {path}"
        )


@lru_cache(maxsize=8)
def _describe(path: str, version: tuple) -> tuple[ModuleConfig, dict[str, str]]:
    """Return config and identity of a source; a study asks for them many times."""
    model, *_ = describe_module(open_source(path))
    return model.config, {"module": _version_text(path), "weights": weights_digest(model.module)}


def _version(path: str) -> tuple:
    """Return what changes when a file does."""
    return () if path.startswith(TIMM) else (_digest(_read(split_source(path)[0])),)


def _version_text(path: str) -> str:
    """Return the name of a model of timm, or the digest of a file."""
    return path if path.startswith(TIMM) else f"{split_source(path)[1]}@{_version(path)[0]}"


def weights_digest(module: nn.Module) -> str:
    """Return the digest of all parameters and buffers of a module, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:DIGITS]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; expected a Python file, FILE.py:FUNCTION"
        ) from None


def _run(file: Path, content: bytes) -> ModuleType:
    """Return a module of the code of a file, which can import what is beside it."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"own_module_{_digest(content)}"
    module = ModuleType(name)
    module.__file__ = str(file.resolve())
    sys.modules[name] = module  # for classes of the file, which are looked up by it
    exec(compile(content, module.__file__, "exec"), module.__dict__)
    return module


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _mark(file: Path, content: bytes) -> Path:
    """Return the file that says that a file was run at the user's wish: at this place, as its imports are beside it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = _digest(str(file.resolve()).encode() + b"\0" + content)
    return cache / "llava_bidir" / OWN_FILES / name


def _remember(file: Path, content: bytes) -> None:
    mark = _mark(file, content)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:  # a home that is read-only: finished runs of this file cannot be opened
        pass
