"""Pages from templates, of reports and of the lab."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def render(template: str, filters: dict[str, Callable] | None = None, **values: Any) -> str:
    """Return the page that a template makes of `values`; `filters` are added to Jinja's own.

    Templates are named by their path in the package, "lab/lab.html.j2".
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parents[1])
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,  # a name that no longer exists is an error, not empty text
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(**values)
