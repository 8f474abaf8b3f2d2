"""Options of an analysis as fields of a dataclass: name, type, default, help and range are written once.

The field `block_by: str = option("site whose predictions ...", ADAPTER)` is `--block-by` on the command line. This
module imports nothing heavy, because it answers `probes --help`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from llava_bidir.common.errors import UserError

Options = TypeVar("Options")


def option(
    help: str,
    default: Any = MISSING,
    *,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    at_least: int | None = None,
    may_be_empty: bool = False,
) -> Any:
    """Return a field of a dataclass that is also an option.

    Args:
        help: What the option is for.
        default: Its value if it is not given; without one, it must be given.
        metavar: Name of a value in the help.
        choices: All values that it can have.
        at_least: Smallest value, which :func:`check_ranges` holds.
        may_be_empty: Of several values, none can be given.
    """
    words = {
        "help": help,
        "metavar": metavar,
        "choices": choices,
        "nargs": "*" if may_be_empty else None,
    }
    known = {key: value for key, value in words.items() if value is not None}
    return field(default=default, metadata={"words": known, "at_least": at_least})


def draws_option(default: int) -> Any:
    """Return the field `draws`."""
    text = "draws to average for each condition with random tokens"
    return option(text, default, at_least=1)


def batch_size_option(default: int, of: str) -> Any:
    """Return the field `batch_size`, the number `of` something."""
    return option(f"{of} per forward", default, at_least=1)


def seed_option(purpose: str) -> Any:
    """Return the field `seed`."""
    return option(f"random seed of {purpose}", 0, at_least=0)


def images_option(default: Any = MISSING) -> Any:
    """Return a field for images of the validation split."""
    return option("indices in the validation split", default, metavar="I")


@dataclass(frozen=True)
class QuestionOptions:
    """Questions about places that the model is asked."""

    questions: Path | None = option(
        "LLaVA's JSON with regions (default: questions.json beside the data set's folder, as demo-assets writes it)",
        None,
        metavar="FILE",
    )
    images: Path | None = option(
        "folder of the images (default: that of the questions)",
        None,
        metavar="DIR",
    )
    limit: int | None = option("number of questions to ask (default: all)", None, at_least=1)


# ------------------------------------------------------------------------------ options that stand in no dataclass
def add_run(parser: argparse.ArgumentParser) -> None:
    """Add --probes, a finished run."""
    parser.add_argument(
        "--probes",
        required=True,
        metavar="RUN",
        help="folder of a finished probe run",
    )


def add_out(parser: argparse.ArgumentParser, default: str = "the run's folder") -> None:
    """Add --out and --overwrite."""
    parser.add_argument("--out", metavar="DIR", help=f"output folder (default: {default})")
    add_overwrite(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite."""
    text = "`true`: replace a result that other options or runs have made"
    parser.add_argument(
        "--overwrite",
        type=_read_bool,
        default="false",
        metavar="BOOL",
        help=text,
    )


def _read_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text == "true"


# ----------------------------------------------------------------------------------- from fields to the command line
def add_fields(parser: argparse.ArgumentParser, options: type) -> None:
    """Add an option for each field of a dataclass."""
    types = get_type_hints(options)
    for entry in fields(options):
        if "words" in entry.metadata:
            name = entry.name.replace("_", "-")
            parser.add_argument(f"--{name}", **_argument(entry, types[entry.name]))


def _argument(entry: Field, annotation: Any) -> dict[str, Any]:
    """Return the keywords of `add_argument` for a field: bool, str, int, float, Path, or a sequence of one."""
    words = dict(entry.metadata["words"])
    kind = annotation
    if kind is bool:
        return words | {"action": "store_true"}
    if type(None) in get_args(kind):  # "int | None"
        kind = get_args(kind)[0]
    if get_origin(kind) is Sequence:
        words.setdefault("nargs", "+")
        (kind,) = get_args(kind)
    words["type"] = kind
    if entry.default is MISSING:
        words["required"] = True
    elif isinstance(entry.default, tuple):
        words["default"] = list(entry.default)
    else:
        words["default"] = entry.default
    return words


def read_fields(
    options: type[Options],
    args: argparse.Namespace,
    **resolved: Any,
) -> Options:
    """Return the options that were given on the command line, some of them `resolved` already."""
    given = {
        entry.name: getattr(args, entry.name)
        for entry in fields(options)
        if hasattr(args, entry.name)
    }
    return options(**given | resolved)


def check_ranges(options: Any) -> None:
    """Raise a UserError that names the first number that is too small."""
    for entry in fields(options):
        least = entry.metadata.get("at_least")
        value = getattr(options, entry.name)
        if least is not None and value is not None and value < least:
            raise UserError(f"{entry.name} must be at least {least}, got {value}")


def read_questions_path(args: argparse.Namespace, root: str | Path) -> dict[str, Path]:
    """Return the files of :class:`QuestionOptions`, by default beside the folder of the data set, `root`."""
    questions = args.questions or Path(root).parent / "questions.json"
    return {"questions": questions, "images": args.images or questions.parent}


def check_questions(options: QuestionOptions) -> None:
    """Raise a UserError if there are no questions."""
    if not options.questions.is_file():
        raise UserError(
            f"{options.questions} is not a file; expected questions with regions (--questions FILE.json)"
        )
