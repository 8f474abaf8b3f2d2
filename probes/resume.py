"""Going on where a probe run was stopped: only as the same run, and without leaving a validation out."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer


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
