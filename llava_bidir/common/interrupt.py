"""What Ctrl-C says of a run: where the same command goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def interrupt_says_what_is_saved(checkpoints: Path) -> Iterator[None]:
    """Name the checkpoint to go on from, or that there is none, when Ctrl-C ends the block.

    Args:
        checkpoints: Folder of the run's checkpoints.

    Raises:
        KeyboardInterrupt: With that sentence, which `one_line_errors` shows.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        by_lightning = isinstance(stop, SystemExit) and isinstance(
            stop.__context__, KeyboardInterrupt
        )
        if isinstance(stop, SystemExit) and not by_lightning:
            raise
        saved = sorted(checkpoints.glob("*.*"), key=lambda path: path.stat().st_mtime_ns)
        complete = [path for path in saved if not path.name.endswith(".partial")]
        if not complete:
            raise KeyboardInterrupt("nothing was saved yet: the same command starts anew") from None
        raise KeyboardInterrupt(
            f"run the same command again with `--ckpt_path last` to go on from {complete[-1]}"
        ) from None
