"""`llava-bidir fit`: train, or with `--dry-run` say what it would cost."""

from llava_bidir.command_options import DRY_RUN


def main(argv: list[str]) -> None:
    """Run `llava-bidir fit`; what only one of its two ways needs is not imported for the other."""
    if {*DRY_RUN} & {*argv}:
        from .dry_run import main as run
    else:
        from llava_bidir.training.command import main as run
    run(argv)
