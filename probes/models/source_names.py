"""Names of models that are no checkpoints; imports nothing heavy: they are told from paths before a model is read.

"timm:NAME" is a model of timm, "FILE.py:FUNCTION" the module that a function returns.
"""

from pathlib import Path

from llava_bidir.common.errors import UserError

TIMM = "timm:"


def is_source(path: str) -> bool:
    """Return whether a model is one of timm or of a function in a file."""
    return str(path).startswith(TIMM) or split_source(path) is not None


def split_source(path: str) -> tuple[Path, str] | None:
    """Return the file and the function of "FILE.py:FUNCTION"; None of another text."""
    file, _, function = str(path).rpartition(":")
    return (Path(file), function) if file.endswith(".py") and function.isidentifier() else None


def check_names_function(path: str) -> None:
    """Raise a UserError if a model is a Python file without the function that returns it."""
    file = Path(str(path).partition(":")[0])
    if file.suffix == ".py" and not is_source(path) and not file.is_dir():
        raise UserError(
            f"{path} names no function of the file; expected FILE.py:FUNCTION, of a function without arguments that "
            f"returns a probes.EncoderModule, e.g. {file}:build"
        )
