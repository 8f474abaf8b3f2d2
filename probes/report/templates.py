"""The pages' templates: probes/report/*.html.j2, what users named escaped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, filters: dict[str, Callable] | None = None, **facts: Any) -> str:
    """The page that a template makes of facts, with filters of its own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(**facts)
