"""The commands of `probes` with options of their own, and these options. `cli.py` has those of LightningCLI's.

A command is an entry of `COMMANDS` with a function that adds its options, or an analysis (`probes.analyses`). Nothing
here imports torch.
"""

from argparse import ArgumentParser

from llava_bidir.common.command_table import Command
from probes.analyses import ANALYSES
from probes.report.options import ReportOptions
from probes.world_options import WORLD_COMMANDS


def add_overwrite(parser: ArgumentParser) -> None:
    """Add --overwrite."""
    parser.add_argument(
        "--overwrite",
        nargs="?",
        const="true",
        choices=("true", "false"),
        default="false",
        help="replace the file if there is one",
    )


def add_image_px(parser: ArgumentParser) -> None:
    """Add --image-px, the side of a bare encoder's square input."""
    text = "side of the square input of a bare encoder, a multiple of its patch (default: as published)"
    parser.add_argument(
        "--image-px",
        type=int,
        metavar="N",
        help=text,
    )


def add_sites_options(parser: ArgumentParser) -> None:
    """Add the options of `probes sites`."""
    parser.add_argument("mllm", help="checkpoint directory or hub id; its weights are not loaded")
    add_image_px(parser)


def add_mask_options(parser: ArgumentParser) -> None:
    """Add the options of `probes mask`."""
    parser.add_argument("mllm", help="checkpoint directory or hub id; loaded in float32")
    text = "image attention that `probes` applies, instead of the model's own forward"
    parser.add_argument("--image-attention", metavar="NAME", help=text)


def add_states_options(parser: ArgumentParser) -> None:
    """Add the options of `probes states`."""
    parser.add_argument("mllm", help="checkpoint directory or hub id")
    parser.add_argument("image", nargs="+", help="image files")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help='.safetensors file with "SITE" f[images, T, d]',
    )
    text = "sites to write; `all` with the encoder's own layers in an MLLM (default: all others)"
    parser.add_argument(
        "--sites",
        nargs="+",
        metavar="SITE",
        help=text,
    )
    parser.add_argument(
        "--image-attention", metavar="NAME", help="image attention (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--prefix", metavar="TEXT", help="text before the image (default: from the chat template)"
    )
    add_image_px(parser)
    add_overwrite(parser)


def add_segment_options(parser: ArgumentParser) -> None:
    """Add the options of `probes segment`."""
    text = "folder of a finished probe run, unless it stands before the photos: probes segment RUN PHOTO ..."
    parser.add_argument("--probes", metavar="RUN", help=text)
    parser.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="image files with distinct names",
    )
    parser.add_argument("--site", help="site of the probe (default: the run's best decoder layer)")
    text = "folder for NAME.png (class indices), NAME_overlay.png, legend.png and legend.json; only files that this "
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help=text + "command has written are replaced",
    )


def add_lab_options(parser: ArgumentParser) -> None:
    """Add the options of `probes lab`."""
    text = "finished probe runs on the same images, one per mask or model, side by side"
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help=text,
    )
    parser.add_argument(
        "--mllm",
        metavar="DIR",
        help="checkpoint directory or hub id without probes: words and attention",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8899,
        help="port of the page; 0 for any free one",
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        help="address to listen at, for other machines (default: 127.0.0.1)",
    )
    text = "folder below which painted photos are saved as data folders and opened again"
    parser.add_argument(
        "--save",
        default="runs/lab",
        metavar="DIR",
        help=text,
    )


COMMANDS = {
    "sites": Command(
        "probes.analyses.extract:print_sites",
        "list the sites of a model, their widths and its attention",
        add_sites_options,
    ),
    "mask": Command(
        "probes.analyses.extract:print_mask",
        (
            "measure which tokens attend to which in each layer; status 1 where config and "
            "family claim otherwise"
        ),
        add_mask_options,
    ),
    "states": Command(
        "probes.analyses.extract:write_states",
        "write the states of images to a safetensors file",
        add_states_options,
    ),
    "segment": Command(
        "probes.analyses.segment:run",
        "write the class maps of any photos",
        add_segment_options,
    ),
    "lab": Command(
        "probes.lab.command:run",
        (
            "open a live page of running models: any photo by layer and patch, with patches "
            "blocked or replaced"
        ),
        add_lab_options,
    ),
    "report": Command(
        "probes.report.page:run",
        "write claims, figures and tables of runs as one self-contained HTML page",
        options=ReportOptions,
    ),
    **WORLD_COMMANDS,
}


def analysis_commands() -> dict[str, Command]:
    """Return the command of each analysis, also of those that have been registered."""
    return {
        name: Command(f"probes.analyses.{name}.run:run", analysis.help, options=analysis.options)
        for name, analysis in ANALYSES.items()
    }
