"""Checks of arguments of public functions: a text is no list of its letters, and a list is no text."""

from typing import Any

from .errors import UserError


def check_is_list(name: str, value: Any, example: str) -> None:
    """Raise if an argument is a text, which Python would take letter by letter, or nothing that has a length.

    Args:
        name: Name of the argument, for the error.
        value: Value of the argument.
        example: A valid value, for the error.

    Raises:
        UserError: Names argument, value and example.
    """
    if isinstance(value, str | bytes | dict) or not hasattr(value, "__len__"):
        raise UserError(f"{name} must be a list such as {example}, got {value!r}")


def check_is_text(name: str, value: Any) -> None:
    """Raise if an argument is not a text, e.g. a list of texts.

    Raises:
        UserError: Names argument and value.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} must be one text, got {value!r}")
