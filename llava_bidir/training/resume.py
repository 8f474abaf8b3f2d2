"""Where in an epoch a checkpoint is, counted in samples."""

from typing import Any

from llava_bidir.common.errors import UserError

POSITION = "trained_micro_batches"  # InstructionData's key


def rescale_progress(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Turns the position in the epoch, counted in micro-batches of `before` samples over all devices, into one counted
    in those of `now`, in place. The optimizer's steps and the order of samples do not depend on it.

    Raises:
        UserError: The position is in the middle of a new micro-batch.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    data = next(state for state in checkpoint.values() if isinstance(state, dict) and POSITION in state)
    for counts in (progress["total"], progress["current"], data):
        behind = counts.get("processed", 0) - counts.get("completed", 0)  # a callback saves before a batch is completed
        for key in counts:
            if counts[key] * before % now and key != "completed":
                raise UserError(
                    f"the checkpoint is at sample {counts[key] * before} of its epoch, which {now} samples at a time "
                    "over all devices do not hit; change data.micro_batch_size or the number of devices"
                )
            counts[key] = counts[key] * before // now
        if "completed" in counts:
            counts["completed"] = counts["processed"] - behind
