"""The claims that a report judges, and the effects that they are made from.

Claims are of the scores by layer, of the analyses, and of analyses outside this repository. An effect is a number with
its resamplings, by name; an analysis adds a claim by a :class:`Claim` and the effect of that name in each run's folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import write_files

from . import ANALYSES
from .analysis import EFFECTS_SUFFIX, Claim, effects_files

if TYPE_CHECKING:  # this module answers `import probes`
    from probes.runs.read import ProbeRun
    from probes.score.estimate import Estimate

CLAIMS: dict[str, Claim] = {
    "adapter_drop": Claim(+1, "Lost at the adapter: encoder − adapter, mIoU"),
    "recovery": Claim(+1, "Recovered in the LLM: best LLM layer − adapter, mIoU"),
    "recovery_trained": Claim(
        +1, "Recovered by training: recovery − that of the untrained model, mIoU"
    ),
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


def register_analysis(name: str, claims: Mapping[str, Claim]) -> None:
    """Add the claims of an analysis outside this repository, so that reports of this process judge them.

    The analysis writes the effect of each claim into the folder of each run (:func:`probes.write_effects`). A report
    then has the three columns of the claim: from trained probes, from solved ones, and beyond random models.
    tests/extending/outside_analysis.py is one.

    Args:
        name: Name of the analysis, an identifier.
        claims: By name.

    Raises:
        UserError: The name is no identifier, or an analysis or claim of that name exists already.
    """
    if not name.isidentifier():
        raise UserError(f"analysis {name!r}: expected a name of letters, digits and _")
    if name in ANALYSES or name in ANALYSIS_OF.values():
        raise UserError(f"analysis {name!r} is registered already; choose another name")
    for claim in claims:
        if claim in CLAIMS:
            raise UserError(f"claim {claim!r} of {name} exists already; choose another name")
    for claim, description in claims.items():
        CLAIMS[claim] = description
        ANALYSIS_OF[claim] = name


def write_effects(run: "ProbeRun", analysis: str, effects: Mapping[str, "Estimate"]) -> Path:
    """Write the effects that an analysis has found in a run into the run's folder, and return the file.

    Args:
        run: The run.
        analysis: Name of the analysis.
        effects: By name. Resamplings must be those of `run.weights`, which all runs on the same images share.

    Raises:
        UserError: A vector has another number of resamplings than the run's weights.
    """
    for name, estimate in effects.items():
        if len(estimate.resampled) != len(run.weights):
            raise UserError(
                f"effect {name!r} of {run.path} has {len(estimate.resampled)} resamplings; expected "
                f"{len(run.weights)}, one for each row of run.weights"
            )
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
