"""Read settings from the words of a command: from `--KEY VALUE`, `--KEY=VALUE` and the files of `-c`.

A study needs a few of them before its steps run. They are merged as LightningCLI does: from left to right, so that the
last one counts.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from llava_bidir.common.configs import OPTIONS, configs_in, find_config
from llava_bidir.common.errors import error_context


def read_setting(words: Sequence[str], key: str, default: Any = None) -> Any:
    """Return the value of a setting such as "model.sites", `default` if no word and no file has it.

    A setting that is a dict has the entries of later words `--KEY.ENTRY VALUE` as well.

    Raises:
        UserError: A config does not exist, or is no YAML.
    """
    found = default
    for name, value in _assignments(words):
        if name == key:
            found = value
        elif name.startswith(f"{key}."):
            entries = found if isinstance(found, dict) else {}
            found = entries | {name.removeprefix(f"{key}."): value}
        elif key.startswith(f"{name}.") and isinstance(value, dict):
            found = _look_up(value, key.removeprefix(f"{name}.").split("."), found)
    return found


def _assignments(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield ("model.sites", value) for words, and (top level key, content) for the files of `-c`."""
    configs = {i: name for i, _, name in configs_in(words)}
    for i, word in enumerate(words):
        if i in configs:
            yield from _read_config(configs[i]).items()
            continue
        if not word.startswith("--") or word.partition("=")[0] in OPTIONS:
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        following = words[i + 1] if i + 1 < len(words) else "--"
        if equals:
            yield name, _parse(value)
        elif not following.startswith("--"):
            yield name, _parse(following)


def _read_config(name: str) -> dict[str, Any]:
    """Return the content of a config by name, path or YAML text."""
    source = find_config(name)
    with error_context(f"config {source}"):
        content = yaml.safe_load(
            source if "\n" in source else Path(source).read_text(encoding="utf-8")
        )
        return dict(content or {})


def _parse(text: str) -> Any:
    """Return a value as YAML reads it; text that is no YAML is itself, and an error of the command that takes it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _look_up(content: dict[str, Any], keys: list[str], default: Any) -> Any:
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            return default
        content = content[key]
    return content
