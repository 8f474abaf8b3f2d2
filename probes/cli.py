"""The `probes` command. Each command's module is imported when the command runs."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from llava_bidir import __version__
from llava_bidir.common.command_table import add_commands, run_chosen
from llava_bidir.common.configs import with_config_paths
from llava_bidir.common.errors import one_line_errors
from llava_bidir.common.option_names import check_options
from llava_bidir.common.short_help import ShortHelp, show_short_help
from llava_bidir.common.usage_errors import ArgumentParser
from probes.command_options import COMMANDS, analysis_commands

OPTIONS = Path(__file__).with_name("options.txt")  # of the commands in LIGHTNING_COMMANDS
REQUIRED = ("model.mllm", "data.root")
LIGHTNING_COMMANDS = {  # their options are defined by LightningCLI
    "fit": "train a probe at every site: -c ade20k --model.mllm DIR --data.root DIR --out RUN",
    "solve": "solve a probe at every site at the optimum of its regularised loss; options as for fit",
    "validate": "score the probes of a checkpoint as they are",
    "test": "score the probes of a checkpoint, each at its best epoch, and write the files of the run",
    "verify-data": "read every image and target before training: -c ade20k --data.root DIR",
}


RUN_OPTIONS = {
    "-c NAME": "config by name or path; later ones replace the values of earlier ones (`llava-bidir configs`)",
    "--model.mllm MODEL": "checkpoint directory or hub id, of an MLLM or of a bare vision encoder",
    "--data.root DIR": "folder of images and masks (probes/README.md), or of the layout below",
    "--data.dataset NAME": "layout: folder, ade20k, voc2012, cityscapes, ... (default: folder)",
    "--data.task NAME": "segmentation, depth, normals or boundaries (default: segmentation)",
    "--data.batch_size N": "images per batch, of all devices together (default: 64)",
    "--model.image_attention NAME": "mask among image tokens; null keeps the model's own (default: null)",
    "--model.untrained LIST": "parts with random weights, for controls: [llm], [adapter], [encoder] (default: null)",
    "--model.match NAME": "how a random LLM resembles the trained one: none, update, permuted (default: none)",
    "--model.image_px N": "side of a bare encoder's input; null takes the published one (default: null)",
    "--model.draw N": "number of the random draw (default: 0)",
    "--out DIR": "folder of the run (default: runs/probes)",
    "--ckpt_path last": "resume an interrupted run, and leave a finished one alone",
    "--overwrite true": "replace the run that the folder holds (default: false)",
}
SOLVER_OPTIONS = {
    "--dry-run": "print memory and hours, measured on a few images",
    "--strengths R ...": "strengths of regularisation (default: the best one, searched in half decades)",
    "--passes N": "most passes over the training images (default: 20)",
    "--folds N": "folds of training images that choose the strength (default: 4)",
    "--sample-images N": "images whose memory is used (default: as many as fit into a quarter of it)",
    "--disk-gb GB": "states on the disk, if all fit: later passes run no model (default: none)",
}
SCORE = "probes test -c folder --model.mllm MODEL --data.root DATA --out runs/mine --ckpt_path last"
HELP = {
    "fit": ShortHelp(
        "Train a probe at every site of a model, as the paper does. `probes solve` is faster and needs no recipe.",
        "probes fit -c ade20k --model.mllm MODEL --data.root ADEChallengeData2016 --out runs/mine",
        RUN_OPTIONS,
    ),
    "solve": ShortHelp(
        "Solve linear probes of all sites at the optimum of their loss, with the strength of regularisation that "
        "cross-validation chooses. Depth and normals are least squares. `probes study` does this for a model and its "
        "random controls.",
        "probes solve --model.mllm MODEL --data.root DATA --out runs/mine",
        RUN_OPTIONS | SOLVER_OPTIONS,
    ),
    "verify-data": ShortHelp(
        "Read every image and target of both splits; exit with status 1 if any cannot be used. All other options are "
        "those of `probes fit`; the model is not needed.",
        "probes verify-data -c folder --data.root DATA",
        {name: text for name, text in RUN_OPTIONS.items() if name.startswith(("-c", "--data"))},
    ),
    "validate": ShortHelp(
        "Score the probes of a checkpoint as they are.",
        SCORE.replace("test", "validate"),
        RUN_OPTIONS,
    ),
    "test": ShortHelp(
        "Score each probe of a checkpoint at its best epoch, and write the files.",
        SCORE,
        RUN_OPTIONS,
    ),
}
OWN_PARSERS = {name: "probes.training.cli" for name in LIGHTNING_COMMANDS}
OWN_PARSERS |= {"solve": "probes.training.solve.command", "study": "probes.studies.command"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; those in OWN_PARSERS parse their own options."""
    parser = ArgumentParser(
        prog="probes",
        description="Layerwise segmentation probes for frozen MLLMs and vision encoders (arXiv 2603.17228).",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    text = "from a model and a folder of images and masks to a report: probes, random controls, analyses, verdicts"
    commands.add_parser("study", help=text, add_help=False)
    for name, text in LIGHTNING_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    add_commands(commands, COMMANDS | analysis_commands())
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: Bad usage or bad input, with a message that says what was expected.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("probes", argv):
        if argv[1:] == ["--version"]:
            argv = argv[1:]
        if not argv:
            build_parser().print_help()
            sys.exit(2)
        argv = show_short_help("probes", argv, HELP)
        if argv[0] in LIGHTNING_COMMANDS:
            required = ["data.root"] if argv[0] == "verify-data" else REQUIRED
            check_options(f"probes {argv[0]}", argv[1:], OPTIONS, required)
        run_command(argv)


def run_command(argv: list[str]) -> None:
    """Run one command; errors of its input are raised as `UserError`."""
    if argv[0] in OWN_PARSERS:
        import_module(OWN_PARSERS[argv[0]]).main(with_config_paths(argv))
        return
    run_chosen(build_parser().parse_args(argv))
