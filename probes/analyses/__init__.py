"""Analyses of finished runs (analysis.py), in the order of the report: each is a module with ANALYSIS, named here.

Commands, the steps of a study, the sections of the report and the table in README.md are generated from this list.
"""

from importlib import import_module

from .analysis import Analysis, RunOptions, run_analysis

NAMES = (
    "position",
    "norms",
    "sinks",
    "starvation",
    "knockout",
    "routes",
    "patching",
    "maps",
    "umap",
    "learning_curve",
)
ANALYSES: dict[str, Analysis] = {
    name: import_module(f"{__name__}.{name}").ANALYSIS for name in NAMES
}
MEASURED = {name: analysis for name, analysis in ANALYSES.items() if analysis.measure}


def run(options: RunOptions) -> None:
    """Run the analysis whose options these are."""
    (analysis,) = (x for x in MEASURED.values() if type(options) is x.options)
    run_analysis(analysis, options)
