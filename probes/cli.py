"""The `probes` command. Each command's module is imported when the command runs."""

import argparse
import sys
from importlib import import_module

from llava_bidir import __version__
from llava_bidir.common import imports
from llava_bidir.common.command_table import Command, add_commands, run_chosen
from llava_bidir.common.errors import one_line_errors
from llava_bidir.common.usage_errors import ArgumentParser
from probes.analyses import ANALYSES
from probes.command_options import (
    LabOptions,
    MaskOptions,
    SegmentOptions,
    SitesOptions,
    StatesOptions,
)
from probes.report.options import ReportOptions
from probes.world_options import WORLD_COMMANDS

from .run_commands import RUN_COMMANDS

OWN_PARSERS = {name: "probes.run_commands" for name in RUN_COMMANDS}
OWN_PARSERS |= {"study": "probes.studies.command"}
COMMANDS = {
    "sites": Command(
        "probes.analyses.extract:print_sites",
        "list the sites of a model, their widths and its attention",
        SitesOptions,
    ),
    "mask": Command(
        "probes.analyses.extract:print_mask",
        (
            "measure which tokens attend to which in each layer; status 1 where config and "
            "family claim otherwise"
        ),
        MaskOptions,
    ),
    "states": Command(
        "probes.analyses.extract:write_states",
        "write the states of images to a safetensors file",
        StatesOptions,
    ),
    "segment": Command(
        "probes.analyses.segment:run",
        "write the class maps of any photos",
        SegmentOptions,
    ),
    "lab": Command(
        "probes.lab.command:run",
        (
            "open a live page of running models: any photo by layer and patch, with patches "
            "blocked or replaced"
        ),
        LabOptions,
    ),
    "report": Command(
        "probes.report.page:run",
        "write claims, figures and tables of runs as one self-contained HTML page",
        ReportOptions,
    ),
    **WORLD_COMMANDS,
}


def analysis_commands() -> dict[str, Command]:
    """Return the command of each analysis, also of those that have been registered."""
    return {
        name: Command(f"probes.analyses.{name}.run:run", analysis.help, options=analysis.options)
        for name, analysis in ANALYSES.items()
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; those in OWN_PARSERS parse their own options."""
    parser = ArgumentParser(
        prog="probes",
        description="Layerwise segmentation probes for frozen MLLMs and vision encoders (arXiv 2603.17228).",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(imports.OPTION, metavar="FILE.py", help=imports.HELP)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    text = "from a model and a folder of images and masks to a report: probes, random controls, analyses, verdicts"
    commands.add_parser("study", help=text, add_help=False)
    for name, command in RUN_COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    add_commands(commands, COMMANDS | analysis_commands())
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: Bad usage or bad input, with a message that says what was expected.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("probes", argv):
        argv = imports.take_imports("probes", argv)
        if argv[1:] == ["--version"]:
            argv = argv[1:]
        if not argv:
            build_parser().print_help()
            sys.exit(2)
        run_command(argv)


def run_command(argv: list[str]) -> None:
    """Run one command; errors of its input are raised as `UserError`."""
    if argv[0] in OWN_PARSERS:
        import_module(OWN_PARSERS[argv[0]]).main(argv)
        return
    run_chosen(build_parser().parse_args(argv))
