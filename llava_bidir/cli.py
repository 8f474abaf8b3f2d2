"""The `llava-bidir` command; the code of a command is imported when it runs."""

from collections.abc import Sequence

from llava_bidir.command_options import COMMANDS
from llava_bidir.common.cli import run

ABOUT = "LLaVA-1.5 with or without bidirectional attention among image tokens (arXiv 2603.17228)."


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: Invalid usage or input, with a message that says what was expected.
    """
    run("llava-bidir", about=ABOUT, groups=lambda: COMMANDS, argv=argv)
