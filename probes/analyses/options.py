"""Options of an analysis by its name, made of values: those of the command line are made by `common/options.py`."""

from collections.abc import Mapping
from typing import Any

from llava_bidir.common.options import options_from, value_from_text

from . import ANALYSES


def options_of(name: str, values: Mapping[str, Any]) -> Any:
    """Return the options of an analysis; those without a value have their defaults.

    Args:
        name: Name of the analysis.
        values: By option, spelled as the fields of `ANALYSES[name].options`.

    Raises:
        UserError: There is no such option, it has another type or is out of range, or one that must be given is not.
    """
    return options_from(ANALYSES[name].options, values, name)


def read_text(name: str, option: str, text: str) -> Any:
    """Return what a text means as the value of an option of an analysis, e.g. ["sky", "road"] for "sky,road".

    Raises:
        UserError: There is no such option, or a list in brackets is no YAML.
    """
    return value_from_text(ANALYSES[name].options, option, text, name)
