"""Where in an epoch a checkpoint is: counted in samples, and never within an optimizer step."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from llava_bidir.common.errors import UserError

POSITION = "trained_micro_batches"  # InstructionData's key


def rescale_progress(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Convert the epoch position from micro-batches of `before` samples over all devices to those of `now`, in place.

    Optimizer steps and the order of samples do not depend on the size of micro-batches.

    Raises:
        UserError: The position is inside a micro-batch of the new size.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    data = next(state for state in checkpoint.values() if isinstance(state, dict) and POSITION in state)
    for counts in (progress["total"], progress["current"], data):
        pending = counts.get("processed", 0) - counts.get("completed", 0)  # callbacks save before a batch is completed
        for key in counts:
            if counts[key] * before % now and key != "completed":
                raise UserError(
                    f"the checkpoint is at sample {counts[key] * before} of its epoch, not at a multiple of {now}, the "
                    "samples of a micro-batch over all devices; change data.micro_batch_size or the number of devices"
                )
            counts[key] = counts[key] * before // now
        if "completed" in counts:
            counts["completed"] = counts["processed"] - pending


def at_step_boundary(trainer: Trainer) -> bool:
    """Whether a checkpoint after this micro-batch can be resumed exactly: none holds the gradients of half a step, and
    behind the last batch of an epoch Lightning would leave out its validation. An epoch leaves its own checkpoint."""
    epoch = trainer.fit_loop.epoch_loop
    return not (epoch._should_accumulate() or epoch._is_training_done)


class SaveAtStepBoundary(Callback):
    """Holds all ModelCheckpoints to that. Those that save every so many steps would otherwise do so at the first
    micro-batch after they are resumed too, where the number of steps is still that of the checkpoint."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if not at_step_boundary(trainer):
            for callback in trainer.checkpoint_callbacks:
                if not callback._every_n_epochs:  # others save when an epoch is done
                    callback._last_global_step_saved = trainer.global_step
