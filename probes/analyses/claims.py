"""The claims that a report judges, and the effects that they are made from.

Claims are of the scores by layer, of the analyses, and of analyses outside this repository. An effect is a number with
its resamplings, by name; an analysis adds a claim by a :class:`Claim` and the effect of that name in each run's folder.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import write_files
from llava_bidir.common.imports import check_takes
from probes.config import Cut

from . import ANALYSES, MEASURED
from .analysis import EFFECTS_SUFFIX, Analysis, Claim, RunOptions, effects_files

if TYPE_CHECKING:  # this module answers `import probes`
    from probes.runs.read import ProbeRun
    from probes.score.estimate import Estimate

# of a study: with solved and with trained probes, and both kinds of random layers
ARMS_OF_CLAIMS = ("trained", "probes", "random", "permuted")
# whose names an analysis, which writes NAME.json and NAME.safetensors, cannot have
FILES_OF_RUN = ("metrics", "manifest", "counts", "effects", "probes", "solve", "fit", "report")
WITHOUT_CONTEXT = {  # by cut of the encoder: recovery_without_context, ..._alone, ..._both, ..._both_alone
    cut: "recovery_without_context" + f"_{cut}".removeprefix("_encoder")
    for cut in get_args(Cut)
    if cut != "llm"
}
CLAIMS: dict[str, Claim] = {
    "adapter_drop": Claim(+1, "Lost at the adapter: encoder − adapter, mIoU"),
    "recovery": Claim(+1, "Recovered in the LLM: best LLM layer − adapter, mIoU"),
    "recovery_trained": Claim(
        +1, "Recovered by training: recovery − that of the untrained model, mIoU"
    ),
    **{
        name: Claim(+1, f"Recovered without context ({cut} cut): recovery, cut − intact, mIoU")
        for cut, name in WITHOUT_CONTEXT.items()
    },
    "layer_gain": Claim(+1, "Built up by the layers: best layer − patch embeddings, mIoU"),
    "over_last": Claim(
        +1,
        "An earlier layer beats the last: best layer − last layer, mIoU",
        unlearned="also in random layers",  # true of where to read, whatever made it so
    ),
    **{name: claim for analysis in ANALYSES.values() for name, claim in analysis.claims.items()},
}
ANALYSIS_OF: dict[str, str] = {  # of each claim of an analysis
    claim: name for name, analysis in ANALYSES.items() for claim in analysis.claims
}


def register_analysis(analysis: Analysis | str, claims: Mapping[str, Claim] = {}) -> None:
    """Add an analysis of a file of your own; commands get it by `--import FILE.py`.

    `probes NAME RUN` runs it, `probes study ... --add NAME` on the runs of a study, and the report has its section and
    judges its claims: from trained probes, from solved ones, and beyond random models. tests/extending/analysis.py is
    one.

    Args:
        analysis: The analysis. A name stands for one that is measured elsewhere: it writes the effect of each claim
            into the folder of each run (:func:`probes.write_effects`).
        claims: Of an analysis that is measured elsewhere, by name.

    Raises:
        UserError: The name cannot be one, or an analysis or claim of that name exists already; or options or functions
            are not what an analysis has.
    """
    if isinstance(analysis, str):
        analysis = Analysis(analysis, claims=claims)
    name = analysis.name
    if not name.isidentifier() or name in FILES_OF_RUN:
        raise UserError(
            f"analysis {name!r}: expected a name of letters, digits and _, not one of {', '.join(FILES_OF_RUN)}"
        )
    if name in ANALYSES or name in ANALYSIS_OF.values():
        raise UserError(f"analysis {name!r} is registered already; choose another name")
    for claim in analysis.claims:
        if claim in CLAIMS:
            raise UserError(f"claim {claim!r} of {name} exists already; choose another name")
    if analysis.measure:
        analysis = _checked(analysis)
        ANALYSES[name] = MEASURED[name] = analysis
    CLAIMS.update(analysis.claims)
    ANALYSIS_OF.update(dict.fromkeys(analysis.claims, name))


def _checked(analysis: Analysis) -> Analysis:
    """Return an analysis of a user's with a title, the arms of its claims, and options by which `run` finds it."""
    options = analysis.options
    if options is RunOptions:
        options = type(f"{analysis.name}_options", (RunOptions,), {})
    elif not (issubclass(options, RunOptions) and "__dataclass_fields__" in vars(options)):
        raise UserError(
            f"options of analysis {analysis.name!r}: expected a dataclass that derives from probes.RunOptions, with "
            "@dataclass(frozen=True, kw_only=True) before it"
        )
    check_takes(analysis.measure, "run", "options")
    for function in filter(None, (analysis.table, analysis.figure, analysis.lines, analysis.rows)):
        check_takes(function, "results")
    arms = analysis.arms
    if analysis.claims:
        arms = tuple(dict.fromkeys((*arms, *ARMS_OF_CLAIMS)))
    title = analysis.title or analysis.name.capitalize()
    return replace(analysis, options=options, arms=arms, title=title)


def write_effects(run: "ProbeRun", analysis: str, effects: Mapping[str, "Estimate"]) -> Path:
    """Write the effects that an analysis has found in a run into the run's folder, and return the file.

    Args:
        run: The run.
        analysis: Name of the analysis.
        effects: By name. Resamplings must be those of `run.weights`, which all runs on the same images share.

    Raises:
        UserError: A vector has another number of resamplings than the run's weights.
    """
    files = effects_files(run, analysis=analysis, effects=effects, folder=run.path)
    write_files(files)
    return next(iter(files))


def read_effects(run: "ProbeRun") -> dict[str, "Estimate"]:
    """Return all effects of a run: its own, and those of its analyses.

    Raises:
        UserError: A file is damaged, or was made from other probes.
    """
    from probes.score.effects import read_effect_file

    effects = dict(run.effects)
    for path in sorted(run.path.glob(f"*{EFFECTS_SUFFIX}")):
        name = path.name.removesuffix(EFFECTS_SUFFIX)
        if name in ANALYSES and not (run.path / ANALYSES[name].result).is_file():
            continue  # a later call with other options had nothing to measure
        of_analysis, made_from = read_effect_file(path)
        if made_from != run.fingerprint:
            raise UserError(
                f"{path} was made from other probes than {run.path} has now; run {name} again or delete it"
            )
        effects |= of_analysis
    return effects
