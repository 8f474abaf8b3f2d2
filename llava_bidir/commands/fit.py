"""`llava-bidir fit`: train, or with `--dry-run` say what it would cost."""

DRY_RUN = ("--dry-run", "--dry_run")


def main(argv: list[str]) -> None:
    """Run `llava-bidir fit`; what only one of its two ways needs is not imported for the other."""
    if {*DRY_RUN} & {*argv}:
        from .dry_run import main as run
    else:
        from llava_bidir.training.cli import main as run
    run(argv)
