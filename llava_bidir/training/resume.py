"""Where in an epoch a checkpoint is, counted in samples."""

from typing import Any

from llava_bidir.common.errors import UserError

POSITION = "trained_micro_batches"  # InstructionData's key


def rescale_progress(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Convert the epoch position from micro-batches of `before` samples over all devices to those of `now`, in place.

    Optimizer steps and the order of samples do not depend on the size of micro-batches.

    Raises:
        UserError: The position is inside a micro-batch of the new size.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    data = next(
        state for state in checkpoint.values() if isinstance(state, dict) and POSITION in state
    )
    for counts in (progress["total"], progress["current"], data):
        # callbacks save before a batch is completed
        pending = counts.get("processed", 0) - counts.get("completed", 0)
        for key in counts:
            if counts[key] * before % now and key != "completed":
                raise UserError(
                    f"the checkpoint is at sample {counts[key] * before} of its epoch, not at a multiple of {now}, the "
                    "samples of a micro-batch over all devices; change data.micro_batch_size or the number of devices"
                )
            counts[key] = counts[key] * before // now
        if "completed" in counts:
            counts["completed"] = counts["processed"] - pending
