"""Protect the results in a run's folder: a command that is repeated never replaces them unasked."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from .atomic_io import write_files
from .checkpoint_io import is_complete, resolve_ckpt_path
from .errors import UserError
from .identity import Identity, check_same_identity, run_identity
from .rank_zero import decide_before_fit

log = logging.getLogger(__name__)

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


def plan_run(
    cli: LightningCLI,
    ckpt_path: str | None,
    checkpoints: Path,
    result: Path,
    read_identity: Callable[[], Identity | None],
    advice_of: Mapping[str, str] | None = None,
) -> RunPlan:
    """Decide on rank 0 whether to start, resume or replace the run in a folder, and return the same plan on all ranks.

    Args:
        cli: Its model, data and trainer; `--overwrite`; the results that a run of its kind writes.
        ckpt_path: "last", a path, or None to start a new run.
        checkpoints: Folder of the run's checkpoints.
        result: The file that marks the run as finished.
        read_identity: Returns the identity stored with `result`.
        advice_of: What to do where a setting differs from the finished run's, by setting.

    Raises:
        UserError: The folder holds a run and neither `--ckpt_path` nor `--overwrite` says what to do with it, its
            identity is another one, or there is no such checkpoint.
    """
    folder = Path(cli.trainer.default_root_dir)
    overwrite = cli.config.get(str(cli.subcommand), cli.config)["overwrite"]

    def plan() -> RunPlan:
        identity = run_identity(cli.trainer, cli.model, cli.datamodule)
        if overwrite and ckpt_path is not None:
            raise UserError(
                "--ckpt_path resumes a run and --overwrite true replaces it; give one of them"
            )
        if overwrite:
            return RunPlan(identity, replaced=_files_of_run(folder, checkpoints, cli.results))
        checkpoint = resolve_ckpt_path(ckpt_path, checkpoints)
        if is_complete(checkpoint if ckpt_path == "last" else None, result):
            if ckpt_path != "last":
                raise _occupied(folder, f"a finished run ({result.relative_to(folder)})")
            check_same_identity(read_identity(), identity, str(result), RESUME_ADVICE, advice_of)
            return RunPlan(identity, finished=True)
        if ckpt_path is None and (left := sorted(checkpoints.glob("*.*"))):
            raise _occupied(folder, f"checkpoints of an unfinished run, e.g. {left[-1].name}")
        if ckpt_path == "last" and not any(checkpoints.glob("*.*")):
            log.info("no checkpoint in %s yet; starting a new run", checkpoints)
        return RunPlan(identity, checkpoint)

    run = decide_before_fit(cli.trainer, plan)
    cli.model.identity = run.identity
    for callback in cli.trainer.callbacks:
        if isinstance(callback, StartOfRun):
            callback.replaced = run.replaced
    return run


def begin_run(trainer: Trainer) -> None:
    """Write config.yaml and delete what the run replaces, once all settings were accepted; without a training loop."""
    for callback in trainer.callbacks:
        if isinstance(callback, StartOfRun):
            callback.begin(trainer)


def check_unfinished(result: Path, overwrite: bool) -> None:
    """Raise a UserError if `result` exists, unless it may be overwritten."""
    if result.exists() and not overwrite:
        raise UserError(f"{result} exists; use another --out, or `--overwrite true` to replace it")


def _occupied(folder: Path, content: str) -> UserError:
    return UserError(
        f"{folder} holds {content}; add `--ckpt_path last` to resume it or `--overwrite true` to replace it, or "
        "choose another --out"
    )


def _files_of_run(folder: Path, checkpoints: Path, names: Sequence[str]) -> list[Path]:
    """Return the results, checkpoints and events in a run's folder."""
    results = [folder / name for name in names]
    return [*checkpoints.glob("*"), *filter(Path.exists, results), *folder.glob(EVENTS)]


class NoEmptyEvents(Callback):
    """Delete the event files of TensorBoard of a run that ends with an error before its first batch.

    Lightning opens them before it sets up data and model. TensorBoard would mix those of failed starts with the run's.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.before = set(folder.glob(EVENTS))
        self.has_begun = False

    def on_train_batch_end(self, *args, **kwargs) -> None:
        """Keep the files from now on."""
        self.has_begun = True

    on_validation_batch_end = on_test_batch_end = on_train_batch_end

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Delete the files that this process has opened, unless it has done a batch."""
        if self.has_begun or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.finalize("failed")
        for file in set(self.folder.glob(EVENTS)) - self.before:
            file.unlink()


class StartOfRun(SaveConfigCallback):
    """Write config.yaml, and delete the results of the run that is replaced, once training starts.

    By then all settings were accepted: a command that is rejected changes nothing.

    Attributes:
        replaced: What is deleted.
        content: Of config.yaml, if it is not what LightningCLI has parsed.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.replaced: list[Path] = []
        self.content = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: Lightning would write config.yaml before the model is built."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write config.yaml and delete `replaced`."""
        self.begin(trainer)

    def begin(self, trainer: Trainer) -> None:
        """Write config.yaml and delete `replaced`; for a run that does not train, too."""
        # trainer.log_dir is the logger's, not the run's
        file = Path(trainer.default_root_dir) / self.config_filename
        if trainer.is_global_zero:
            # Lightning would write it through a link, into a file that is not the run's.
            content = self.content or self.parser.dump(self.config, skip_none=False)
            write_files({file: content})
            for path in self.replaced:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.replaced = []
