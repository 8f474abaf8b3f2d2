"""What to do where a run cannot be resumed as it is asked for."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from llava_bidir.common.imports import imports_as_text


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
