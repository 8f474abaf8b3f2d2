"""Render the Jinja templates of this folder; all values are HTML-escaped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, filters: dict[str, Callable] | None = None, **values: Any) -> str:
    """Return the page that a template makes of `values`; `filters` are added to Jinja's own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(**values)
