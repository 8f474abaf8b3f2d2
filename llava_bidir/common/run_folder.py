"""Protect the results in a run's folder: a command that is repeated never replaces them unasked."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .atomic_io import write_files
from .checkpoint_io import is_complete, resolve_ckpt_path
from .errors import UserError
from .identity import Identity, check_same_identity

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
EVENTS = "events.out.tfevents.*"
RESUME_ADVICE = "resume with the original setting, or start a new run with another --out"


@dataclass(frozen=True)
class RunPlan:
    """What `fit` does with a run's folder.

    Args:
        identity: Identity of this run.
        checkpoint: Checkpoint to resume, or None.
        finished: The folder holds the finished run of this identity.
        replaced: Files to delete once training starts.
    """

    identity: Identity
    checkpoint: str | None = None
    finished: bool = False
    replaced: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and what a run of its kind leaves in it.

    Args:
        path: The folder.
        checkpoints: Folder of the run's checkpoints.
        result: The file that marks the run as finished.
        results: Names of all that a run writes, besides config, events and checkpoints.
        read_identity: Returns the identity stored with `result`.
    """

    path: Path
    checkpoints: Path
    result: Path
    results: Sequence[str]
    read_identity: Callable[[], Identity | None]


def plan_run(
    folder: RunFolder,
    identity: Identity,
    ckpt_path: str | None,
    overwrite: bool,
    advice_of: Mapping[str, str] | None = None,
) -> RunPlan:
    """Return whether to start, resume or replace the run in a folder; one process decides for all.

    Args:
        folder: The folder of the run.
        identity: Of this run.
        ckpt_path: "last", a path, or None to start a new run.
        overwrite: Replace the run that the folder holds.
        advice_of: What to do where a setting differs from the finished run's, by setting.

    Raises:
        UserError: The folder holds a run and neither `ckpt_path` nor `overwrite` says what to do with it, its identity
            is another one, or there is no such checkpoint.
    """
    checkpoints = folder.checkpoints
    if overwrite and ckpt_path is not None:
        raise UserError(
            "--ckpt_path resumes a run and --overwrite true replaces it; give one of them"
        )
    if overwrite:
        return RunPlan(identity, replaced=_files_of_run(folder))
    checkpoint = resolve_ckpt_path(ckpt_path, checkpoints)
    if is_complete(checkpoint if ckpt_path == "last" else None, folder.result):
        if ckpt_path != "last":
            name = folder.result.relative_to(folder.path)
            raise _occupied(folder.path, f"a finished run ({name})")
        saved = folder.read_identity()
        check_same_identity(saved, identity, str(folder.result), RESUME_ADVICE, advice_of)
        return RunPlan(identity, finished=True)
    if ckpt_path is None and (left := sorted(checkpoints.glob("*.*"))):
        raise _occupied(folder.path, f"checkpoints of an unfinished run, e.g. {left[-1].name}")
    if ckpt_path == "last" and not any(checkpoints.glob("*.*")):
        log.info("no checkpoint in %s yet; starting a new run", checkpoints)
    return RunPlan(identity, checkpoint)


def begin_run(folder: Path, config: str, replaced: Sequence[Path]) -> None:
    """Write config.yaml and delete what the run replaces, once all settings were accepted; on one process.

    A link is replaced, not written through: its file is not the run's.
    """
    write_files({folder / CONFIG_FILE: config})
    for path in replaced:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _occupied(folder: Path, content: str) -> UserError:
    return UserError(
        f"{folder} holds {content}; add `--ckpt_path last` to resume it or `--overwrite true` to replace it, or "
        "choose another --out"
    )


def _files_of_run(folder: RunFolder) -> list[Path]:
    """Return the results, checkpoints and events in a run's folder."""
    results = [folder.path / name for name in folder.results]
    events = folder.path.glob(EVENTS)
    return [*folder.checkpoints.glob("*"), *filter(Path.exists, results), *events]
