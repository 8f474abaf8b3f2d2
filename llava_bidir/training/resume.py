"""Where in an epoch a checkpoint is, counted in samples."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from llava_bidir.common.errors import UserError
from llava_bidir.common.imports import imports_as_text

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


def how_to_train_on(run: Path, trainable: Sequence[str]) -> dict[str, str]:
    """Return what to do where the length of a run differs, by setting.

    The learning rate follows a cosine that ends with the run: a longer one has other rates from its first step.

    Args:
        run: Folder of the run.
        trainable: Parts that it trains.
    """
    export = run / "hf"
    first = ""
    if not export.is_dir():
        export = run.with_name(f"{run.name}-export")  # RUN/hf is that of a finished run
        first = (
            f"`llava-bidir export {quote(str(run))} {quote(str(export))}{imports_as_text()}`, then "
        )
    parts = [part for part in ("adapter", "llm") if part in trainable]
    options = " ".join(f"--model.{part} {quote(str(export))}" for part in parts)
    advice = (
        "its learning rate ends with it, so it cannot be made longer or shorter. Resume it as it was, or train on from "
        f"its weights in a new run: {first}the same command with {options} --out NEW"
    )
    return dict.fromkeys(("trainer.max_steps", "trainer.max_epochs"), advice)
