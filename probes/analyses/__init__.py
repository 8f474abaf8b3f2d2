"""Analyses of finished runs. Each is a folder (see base.py) and a name in this list, in the order of the report.

Commands, the steps of a study, the sections of the report and the table in README.md are generated from it.
"""

from importlib import import_module

from .base import Analysis

NAMES = (
    "starvation",
    "knockout",
    "routes",
    "patching",
    "maps",
    "umap",
)
ANALYSES: dict[str, Analysis] = {
    name: import_module(f"{__name__}.{name}").ANALYSIS for name in NAMES
}
