"""Going on where a probe run was stopped: from its newest whole checkpoint, only as the same run, and without leaving a
validation out."""

import io
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

from .writing import write_files

log = logging.getLogger(__name__)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written beside their name and then renamed. Lightning's own are written to /tmp, which may
    be another file system, and moved."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_files({Path(path): buffer.getbuffer()})


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a file that `torch.save` wrote is there, and as it was written: each part has a checksum."""
    try:
        with zipfile.ZipFile(checkpoint) as parts:
            return parts.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is not damaged, None if there is none; says which it passes over."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if is_whole(path):
            return path
        log.warning("%s is damaged; an earlier checkpoint is taken", path)
    return None


def checkpoint_of(name: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--ckpt_path` names: `last` is the newest whole one in `folder`, None where there is none.

    Raises:
        ValueError: The one that is named is not there or damaged; no other is taken without asking.
    """
    if name == "last":
        return newest_whole(folder)
    if name is None or is_whole(Path(name)):
        return None if name is None else Path(name)
    problem = "is damaged" if Path(name).exists() else "is not there"
    raise ValueError(f"--ckpt_path {name} {problem}; the newest whole one in {folder} is {newest_whole(folder)}")


def check_same_run(saved: dict[str, Any], now: dict[str, Any], of: str) -> None:
    """That a checkpoint is not gone on with as another run: half of each would be probes of no recipe at all.

    Args:
        saved: Settings of the run that wrote it.
        now: Those of this run.
        of: Where they are set: model or data.

    Raises:
        ValueError: One of them differs.
    """
    for key in now:
        if _plain(saved.get(key)) != _plain(now[key]):
            raise ValueError(
                f"the checkpoint is of a run with {of}.{key}={saved.get(key)!r}, this one has {now[key]!r}; go on with "
                "what it was started with, or start anew with another --out"
            )


def _plain(setting: Any) -> str:
    """The same for a tuple and a list, and for a folder that is spelled otherwise."""
    if isinstance(setting, str) and Path(setting).exists():
        setting = str(Path(setting).resolve())
    return json.dumps(setting, sort_keys=True, default=str)


class CatchUpValidation(Callback):
    """Validates after a resume from between an epoch's last step and its validation: Lightning would leave it out."""

    def __init__(self):
        self.validated_step = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated_step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs, rest = divmod(trainer.global_step, trainer.datamodule.steps_per_epoch)
        if rest or epochs % (trainer.check_val_every_n_epoch or 1) or self.validated_step == trainer.global_step:
            return
        validation = trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False  # from its first batch on
        trainer.validating = True
        validation.run()
        trainer.training = True

    def state_dict(self) -> dict[str, int]:
        return {"validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validated_step = state_dict["validated_step"]
