"""The command `probes study`."""

from itertools import takewhile
from pathlib import Path

from llava_bidir.common.configs import OPTIONS
from llava_bidir.common.errors import UserError
from llava_bidir.common.option_names import check_options
from llava_bidir.common.usage_errors import ArgumentParser
from probes.analyses import ANALYSES
from probes.cli import SOLVER_OPTIONS

# "N" or "R ..." by the option of `probes solve` that it is the value of
SOLVER_VALUES = dict(option.split(maxsplit=1) for option in SOLVER_OPTIONS if " " in option)


def build_parser() -> ArgumentParser:
    """Return the parser of the options that are the study's own."""
    parser = ArgumentParser(
        prog="probes study",
        description="Solve the probes of a model and of its random controls, run the analyses, and write a report with "
        "verdicts. What is finished is not done again: repeat the command after a kill, or with more draws. All other "
        "options are those of `probes solve` (-c CONFIG, --data.root, --data.batch_size, --trainer.devices, ...).",
        epilog="example: probes study llava-hf/llava-1.5-7b-hf photos --out runs/photos",
        allow_abbrev=False,
    )
    text = "checkpoint directory or hub id, or two of them as causal=DIR bidirectional=DIR; then a folder of images "
    text += "and masks (probes/README.md), or the name of a layout (ade20k, with --data.root DIR)"
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="MODEL ... DATA",
        help=text,
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder of the study",
    )
    text = "draws of random LLMs, and of random adapters; two of permuted LLMs are added"
    parser.add_argument(
        "--draws",
        type=int,
        default=3,
        metavar="N",
        help=text,
    )
    text = "arms to solve: trained, random0, adapter0, permuted0, untrained0, ... (default: trained and all draws)"
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help=text,
    )
    parser.add_argument("--fit", action="store_true", help="also train probes, as the paper does")
    text = "other tasks: depth, normals, boundaries"
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help=text,
    )
    further = ", ".join(name for name, analysis in ANALYSES.items() if not analysis.default)
    text = f"further analyses ({further}), or options of one: knockout.classes=sky,road"
    parser.add_argument(
        "--add",
        nargs="+",
        default=[],
        metavar="NAME[.OPTION=VALUE]",
        help=text,
    )
    text = f"only these steps: {', '.join(['solve', 'fit', *ANALYSES, 'report'])}"
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STEP",
        help=text,
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the steps, time, disk and detectable effect"
    )
    text = "`true`: replace results that other settings, models or images have made"
    parser.add_argument(
        "--overwrite",
        choices=["true", "false"],
        default="false",
        metavar="BOOL",
        help=text,
    )
    return parser


def main(argv: list[str]) -> None:
    """Run `probes study`."""
    parser = build_parser()
    words, given = join_settings(argv[1:])
    for option, *value in given.values():
        if not value and "=" not in option:
            parser.error(f"argument {option}: expected a value")
    args, unknown = parser.parse_known_args(words)
    options = [part for word in unknown for part in given.get(word, [word])]
    known = Path(__file__).parents[1] / "options.txt"
    check_options("probes study", options, known, ())
    if len(args.inputs) < 2:
        parser.error(
            "expected a model and a folder of images and masks: probes study MODEL DATA --out DIR"
        )
    *models, data = args.inputs
    labelled = label_models(models)

    from probes.data.registry import DATASETS

    from .plan import Settings
    from .run import run_study

    if data in DATASETS:
        check_options("probes study", options, known, ("data.root",))
    tuples = {key: tuple(getattr(args, key)) for key in ("tasks", "add")}
    tuples |= {key: getattr(args, key) and tuple(getattr(args, key)) for key in ("arms", "only")}
    settings = Settings(
        labelled,
        data,
        Path(args.out),
        args.draws,
        fit=args.fit,
        options=tuple(options),
        **tuples,
    )
    if args.dry_run:
        from .estimate import print_estimate

        print_estimate(settings)
    else:
        run_study(settings, args.overwrite == "true")


def join_settings(words: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the words with options of `probes solve` and their values as one word each, and what these stand for.

    argparse, which does not know these options, would take a value before MODEL for a model.
    """
    joined: list[str] = []
    settings: dict[str, list[str]] = {}
    i = 0
    while i < len(words):
        name, equals, _ = words[i].partition("=")
        is_section_key = name.startswith("--") and "." in name
        if is_section_key or name in OPTIONS or name in SOLVER_VALUES:
            values = [] if equals else _values(words[i + 1 :], SOLVER_VALUES.get(name, ""))
            placeholder = f"--setting-{i}"
            settings[placeholder] = [words[i], *values]
            joined.append(placeholder)
            i += 1 + len(values)
        else:
            joined.append(words[i])
            i += 1
    return joined, settings


def _values(words: list[str], expected: str) -> list[str]:
    """Return the values of an option, with which `words` begins: one, or as many numbers as there are for "R ..."."""
    values = list(takewhile(lambda word: not word.startswith("--"), words))
    if expected.endswith("..."):
        return list(takewhile(_is_number, values))
    return values[:1]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def label_models(models: list[str]) -> dict[str, str]:
    """Return the models by label: "" for one, else the text before "=" or the model's own mask.

    Raises:
        UserError: Two models have one label, or there are more than two.
    """
    if len(models) > 2:
        raise UserError(f"a study has one model or two, got {len(models)}: {', '.join(models)}")
    pairs = [
        text.split("=", 1) if "=" in text and not Path(text).exists() else ["", text]
        for text in models
    ]
    if len(pairs) == 2 and not all(label for label, _ in pairs):
        from probes.models.families import own_image_attention
        from probes.models.prompt_and_pixels import read_config

        pairs = [
            [label or own_image_attention(read_config(model)), model] for label, model in pairs
        ]
    if len({label for label, _ in pairs}) < len(pairs):
        raise UserError(f"both models are called {pairs[0][0]!r}; name them: first=DIR second=DIR")
    return dict(pairs)
