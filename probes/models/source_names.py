"""Names of models that are no checkpoints; imports nothing, since they are told from paths before a model is read.

"timm:NAME" is a model of timm, "FILE.py:FUNCTION" the module that a function returns.
"""

from pathlib import Path

TIMM = "timm:"


def is_source(path: str) -> bool:
    """Return whether a model is one of timm or of a function in a file."""
    return str(path).startswith(TIMM) or split_source(path) is not None


def split_source(path: str) -> tuple[Path, str] | None:
    """Return the file and the function of "FILE.py:FUNCTION"; None of another text."""
    file, _, function = str(path).rpartition(":")
    return (Path(file), function) if file.endswith(".py") and function.isidentifier() else None
