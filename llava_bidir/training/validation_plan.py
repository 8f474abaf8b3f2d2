"""When a training validates, and whether its callbacks wait for metrics that it logs; said before the first step."""

import math

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from llava_bidir.common.epoch_length import optimizer_steps
from llava_bidir.common.errors import UserError
from llava_bidir.data.conversation import PLAIN
from llava_bidir.data.datamodule import InstructionData

from .throughput import MFU, Throughput

OF_TRAINING = ("train/loss", "train/supervised_tokens", "train/grad_norm")
OF_LIGHTNING = ("epoch", "step")  # which a ModelCheckpoint can monitor
RATES = "lr-"  # beginning of the names of learning rates


class ValidationPlan(Callback):
    """Say when validation runs, or why it does not, and check what other callbacks wait for."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log one line; the datasets are open, and the model is not built yet.

        Raises:
            UserError: A callback waits for a metric that this training does not log within its steps.
        """
        data = trainer.datamodule
        if stage != "fit" or not isinstance(data, InstructionData):
            return
        reason = find_reason_for_none(trainer, data)
        if reason is None:
            count = f"{len(data.val):,} {'captions' if _has_captions(data) else 'questions'}"
            first = math.ceil(first_validation(trainer, data) / trainer.accumulate_grad_batches)
            total = optimizer_steps(trainer)
            rank_zero_info(f"validation: {count}, first after step {first:,} of {total:,}")
        else:
            rank_zero_info(f"validation: none, since {reason}")
        for callback in trainer.callbacks:
            _check_monitor(callback, trainer, data, reason)


def _has_captions(data: InstructionData) -> bool:
    return data.collate.template == PLAIN


def first_validation(trainer: Trainer, data: InstructionData) -> int:
    """Return the number of micro-batches of a new run before its first validation, as Lightning counts them."""
    per_epoch = data.micro_batches_per_epoch
    interval = trainer.val_check_interval
    if isinstance(interval, float):
        interval = max(1, int(per_epoch * interval))
    return (max(trainer.check_val_every_n_epoch or 1, 1) - 1) * per_epoch + interval


def find_reason_for_none(trainer: Trainer, data: InstructionData) -> str | None:
    """Return why a new run of these settings does not validate; None if it does."""
    if not data.val_annotations:
        return "data.val_annotations is not set"
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches is 0"
    first = first_validation(trainer, data)
    a_step = trainer.accumulate_grad_batches
    total = optimizer_steps(trainer)
    if first <= total * a_step:
        return None
    return (
        f"it would first run after step {math.ceil(first / a_step):,}, and the run has {total:,}; "
        f"`--trainer.val_check_interval {min(data.micro_batches_per_epoch, total * a_step)}` validates earlier (in "
        f"micro-batches, {a_step} a step)"
    )


def logged_metrics(trainer: Trainer, data: InstructionData, *, validates: bool) -> list[str]:
    """Return the names of the metrics that a training logs, but for learning rates."""
    names = [*OF_TRAINING]
    for callback in trainer.callbacks:
        if isinstance(callback, Throughput):
            names += callback.logged_metrics(trainer)
    if validates:
        names += ["val/loss", *([] if _has_captions(data) else ["val/answer_accuracy"])]
    return names


def _check_monitor(
    callback: Callback,
    trainer: Trainer,
    data: InstructionData,
    reason: str | None,
) -> None:
    """Raise if a callback waits for a metric that neither this training nor a callback of the user can log.

    Args:
        callback: EarlyStopping, ModelCheckpoint or another one with a `monitor`.
        trainer: Its trainer.
        data: Its data.
        reason: Why there is no validation, or None.
    """
    metric = getattr(callback, "monitor", None)
    known = logged_metrics(trainer, data, validates=reason is None)
    if metric is None or metric in (*known, *OF_LIGHTNING) or str(metric).startswith(RATES):
        return
    with_validation = logged_metrics(trainer, data, validates=True)
    if metric in with_validation:
        why = f"validation does not run: {reason}"
    elif any(_is_of_user(other) for other in trainer.callbacks):
        return  # it may log it
    elif metric == MFU:
        why = "the peak of this device is not known; --throughput.peak_tflops sets it"
    else:
        why = f"this stage logs {', '.join(known)}"
    raise UserError(f"{type(callback).__name__} waits for {metric!r}, but {why}")


def _is_of_user(callback: Callback) -> bool:
    return type(callback).__module__.partition(".")[0] not in ("lightning", "llava_bidir")
