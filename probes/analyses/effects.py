"""The effects of a run, its own and those of its analyses: vectors of a number and its resamplings, by name.

An analysis adds a claim by two things: a `Claim` (claims.py), and the effect of that name in each run's folder, written
by :func:`write_effects`. The report then judges it in three columns, as it does the paper's claims.
"""

from collections.abc import Mapping
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import write_files
from probes.runs.finished_run import FinishedRun
from probes.score.effect_file import effect_file, read_effect_file
from probes.score.estimate import Estimate

from . import ANALYSES

SUFFIX = "_effects.safetensors"  # of a file of effects, after the name of the analysis


def effects_path(folder: Path, analysis: str) -> Path:
    """Return the file of the effects of an analysis."""
    return folder / f"{analysis}{SUFFIX}"


def write_effects(run: FinishedRun, analysis: str, effects: Mapping[str, Estimate]) -> Path:
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
    path = effects_path(run.path, analysis)
    write_files({path: effect_file(effects, run.fingerprint)})
    return path


def read_effects(run: FinishedRun) -> dict[str, Estimate]:
    """Return all effects of a run: its own, and those of its analyses.

    Raises:
        UserError: A file is damaged, or was made from other probes.
    """
    effects = dict(run.effects)
    for path in sorted(run.path.glob(f"*{SUFFIX}")):
        analysis = ANALYSES.get(path.name.removesuffix(SUFFIX))
        if analysis is not None and not (run.path / analysis.result).is_file():
            continue  # a later call with other options had nothing to measure
        found, made_from = read_effect_file(path)
        _check_made_from(run, path, made_from)
        effects |= found
    return effects


def _check_made_from(run: FinishedRun, path: Path, made_from: str | None) -> None:
    if made_from != run.fingerprint:
        name = path.name.removesuffix(SUFFIX)
        raise UserError(
            f"{path} was made from other probes than {run.path} has now; run {name} again or delete it"
        )
