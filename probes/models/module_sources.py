"""Models that are no checkpoints, as commands name them: "timm:NAME", and "FILE.py:FUNCTION" of one's own.

The function takes no arguments and returns a `probes.EncoderModule`. Its file runs as a script does, with all that it
imports: name only files that you have read. Checkpoints, hub ids and models of timm run no code of theirs. A finished
run names its model, too, and may come from someone else: a file is run for it only if you say so, by `--trust true`, or
if you have named this file with this content in the same process.

Nothing heavy is imported before a module is read.
"""

import hashlib
import sys
from functools import lru_cache
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.identity import DIGITS
from llava_bidir.common.imports import code_of

if TYPE_CHECKING:
    from torch import nn

    from .families.modules import ModuleConfig
    from .own_module import EncoderModule

TIMM = "timm:"
EXPECTED = (
    "probes.EncoderModule(module, preprocess=(mean, std), patch=14, layers='blocks', norm='norm', image_px=224, "
    "parts={'attn': 'attn', 'mlp': 'mlp'}), with LayerScale {'attn': 'ls1', 'mlp': 'ls2'} (probes/models/encoders.md)"
)
_named: set[tuple[Path, str]] = set()  # files, with digests of their content, that were asked for


def is_source(path: str) -> bool:
    """Return whether a model is one of timm or of a function in a file."""
    return str(path).startswith(TIMM) or _split(path) is not None


def check_names_function(path: str) -> None:
    """Raise a UserError if a model is a Python file without the function that returns it."""
    file = Path(str(path).partition(":")[0])
    if file.suffix == ".py" and not is_source(path) and not file.is_dir():
        raise UserError(
            f"{path} names no function of the file; expected FILE.py:FUNCTION, of a function without arguments that "
            f"returns a probes.EncoderModule, e.g. {file}:build"
        )


def absolute_source(path: str) -> str:
    """Return a source whose file has an absolute path, so that it is found from any directory."""
    if path.startswith(TIMM):
        return path
    file, function = _split(path)
    return f"{file.resolve()}:{function}"


def open_source(path: str, image_px: int | None = None) -> "EncoderModule":
    """Return the module that a source names.

    Args:
        path: Source, see :func:`is_source`.
        image_px: Side of the square input, which a model of timm is made for; None for its own.

    Raises:
        UserError: timm or the model is not there, or the file cannot be run or returns something else.
    """
    from .own_module import EncoderModule
    from .timm_models import load_timm

    if path.startswith(TIMM):
        return load_timm(path.removeprefix(TIMM), image_px)
    file, name = _split(path)
    content = _read(file)
    _named.add((file.resolve(), _digest(content)))
    with error_context(path), code_of(file):
        function = getattr(_run(file, content), name, None)
        if not callable(function):
            raise UserError(f"{file} has no function {name!r}")
        encoder = function()
        if not isinstance(encoder, EncoderModule):
            raise UserError(f"{name}() returned a {type(encoder).__name__}; expected {EXPECTED}")
    return encoder


def module_config(path: str) -> "ModuleConfig":
    """Return the config of the module that a source names."""
    return _describe(path, _version(path))[0]


def source_identity(path: str) -> str | dict[str, str]:
    """Return what identifies the model that a source names: its file and its weights; a checkpoint's path as it is."""
    if not is_source(path):
        return path
    return _describe(path, _version(path))[1]


def check_trusted(path: str, run: Path) -> None:
    """Raise a UserError if the model of a finished run is in a file that nobody has asked to run."""
    if not is_source(path) or path.startswith(TIMM):
        return
    file, _ = _split(path)
    if (file.resolve(), _digest(_read(file))) not in _named:
        raise UserError(
            f"{run} is of {path}, a file with code. Read it, then allow it: --trust true, or "
            "probes.ProbeRun(RUN, trust=True)"
        )


@lru_cache(maxsize=8)
def _describe(path: str, version: str) -> tuple["ModuleConfig", dict[str, str]]:
    """Return config and identity of a source; a study asks for them many times."""
    from .own_module import describe_module

    model, _ = describe_module(open_source(path))
    identity = {"module": version, "weights": weights_digest(model.module)}
    if not path.startswith(TIMM):
        identity |= _imported_code(_split(path)[0])
    return model.config, identity


def _imported_code(file: Path) -> dict[str, str]:
    """Return the digests of what a file that has run imports, also by way of others; of no installed packages."""
    packages = [
        module
        for name, module in sys.modules.items()
        if "." not in name and hasattr(module, "__path__")
    ]
    # an editable install can be on no path
    folders = [*sys.path, *(str(Path(package.__path__[0]).parent) for package in packages)]
    # installed packages are beside their metadata
    searched = [folder for folder in folders if not any(Path(folder).glob("*.dist-info"))]
    finder = ModuleFinder(searched, excludes=[*sys.stdlib_module_names, "llava_bidir", "probes"])
    script = finder.add_module("__main__")
    # else a relative import is an error, also where Python would go on without it
    script.__path__ = [str(file.parent)]
    finder.scan_code(compile(_read(file), file, "exec"), script)  # runs nothing
    return {
        f"import {name}": _digest(_read(Path(module.__file__)))
        for name, module in finder.modules.items()
        if module.__file__
    }


def _version(path: str) -> str:
    """Return the name of a model of timm, or a function and the digest of its file."""
    if path.startswith(TIMM):
        return path
    file, function = _split(path)
    return f"{function}@{_digest(_read(file))}"


def weights_digest(module: "nn.Module") -> str:
    """Return the digest of all parameters and buffers of a module, by name."""
    from torch import uint8

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy())
    return digest.hexdigest()[:DIGITS]


def _split(path: str) -> tuple[Path, str] | None:
    """Return the file and the function of "FILE.py:FUNCTION"; None of another text."""
    file, _, function = str(path).rpartition(":")
    if file.endswith(".py") and function.isidentifier():
        return Path(file), function
    return None


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
