"""The YAML files of configs/, found by name in a clone and in an installed package: `-c stage2 -c clip -c zero3`."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError, did_you_mean
from .imports import take_option

FOLDER = Path(__file__).parents[1] / "configs"  # in a clone a link to configs/, in a wheel a copy


def config_names() -> dict[str, Path]:
    """Return the files by name: "FOLDER/STEM", and "STEM", which is the file nearest to the top."""
    files = sorted(FOLDER.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    names = {}
    for file in files:
        path = file.relative_to(FOLDER)
        names[path.with_suffix("").as_posix()] = file
    for file in files:
        names.setdefault(file.stem, file)
    return names


def find_config(name: str) -> Path:
    """Return the path of a config: `name` itself if it is a file, else that of the config of this name.

    Raises:
        UsageError: There is no such file and no config of this name.
    """
    if Path(name).is_file():
        return Path(name)
    names = config_names()
    if name not in names:
        raise UsageError(
            f"there is no config {name!r} in {FOLDER}, and no such file{did_you_mean(name, names)}"
        )
    return names[name]


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuse a key that a mapping has twice; YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise UsageError(f"the key {key!r} occurs twice")
        return super().construct_mapping(node, deep)


def read_config(name: str) -> dict[str, Any]:
    """Return the content of a config, nested as in YAML.

    Raises:
        UsageError: There is no such config, or it is no mapping of unique keys.
    """
    file = find_config(name)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise UsageError(f"{file}: expected keys and values as in {FOLDER}, got {content!r}")
    return content or {}


def merge_configs(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of configs and others, nested as in YAML; later ones replace earlier ones, key by key."""

    def merge(before: Any, now: Any) -> Any:
        if not (isinstance(before, dict) and isinstance(now, Mapping)):
            return now
        return before | {key: merge(before.get(key), value) for key, value in now.items()}

    contents = [read_config(name) for name in names]
    return reduce(merge, [*contents, values], {})


def take_configs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the configs among the words of a command, and the other words."""
    return take_option(words, "-c", "--config")


def configs_first(words: Sequence[str]) -> list[str]:
    """Return words for LightningCLI: the paths of all configs, then the options, which replace their values.

    Raises:
        UsageError: There is no such config, or it has a key twice.
    """
    configs, others = take_configs(words)
    options = []
    for name in configs:
        read_config(name)
        options.append(f"--config={find_config(name)}")
    return [*options, *others]
