"""Results on the disk: whole or not at all, and together what belongs together."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file


def write_files(contents: Mapping[Path, Any]) -> None:
    """Writes files that belong together, so that a reader sees each of them whole or not at all.

    All are written and on the disk before the first takes its name; until then those of before stay. The last one is
    not there while the others take theirs: it says that all are of one kind.

    Args:
        contents: By path: tensors by name for a .safetensors, what JSON has for a .json, else text or bytes.

    Raises:
        ValueError: One cannot be written: the disk is full or read-only. What was there before is as it was.
    """
    *others, last = contents
    partials = {path: path.with_name(path.name + ".partial") for path in contents}
    path = last
    try:
        for path, partial in partials.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(partial, path.suffix, contents[path])
        if others:
            last.unlink(missing_ok=True)
        for path, partial in partials.items():
            partial.replace(path)
        for folder in {path.parent for path in contents}:
            _to_disk(folder)  # the names too
    except (OSError, SafetensorError) as error:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()  # on a full disk, room for others
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be written ({why}); mend that and give the same command again") from None


def _write(path: Path, suffix: str, content: Any) -> None:
    if suffix == ".safetensors":
        save_file({name: x.detach().cpu().contiguous() for name, x in content.items()}, path)
    else:
        text = json.dumps(content, indent=1) + "\n" if suffix == ".json" else content
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    _to_disk(path)


def _to_disk(path: Path) -> None:
    """Waits until a file or folder would survive a power cut; a name may come before its content otherwise."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
