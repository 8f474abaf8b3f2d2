"""The `probes` command and its options. Each command's module is imported when the command runs."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from llava_bidir import __version__
from llava_bidir.common.configs import with_config_paths
from llava_bidir.common.errors import one_line_errors
from llava_bidir.common.option_names import check_options
from llava_bidir.common.short_help import ShortHelp, show_short_help
from llava_bidir.common.usage_errors import ArgumentParser
from probes.analyses import ANALYSES
from probes.analyses.options import add_overwrite

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
    "--passes N": "most passes over the training images (default: 10)",
    "--folds N": "folds of training images that choose the strength (default: 4)",
    "--sample-images N": "images whose memory is used (default: as many as fit into a quarter of it)",
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


def add_image_px(parser: argparse.ArgumentParser) -> None:
    """Add --image-px, the side of a bare encoder's square input."""
    text = "side of the square input of a bare encoder, a multiple of its patch (default: as published)"
    parser.add_argument(
        "--image-px",
        type=int,
        metavar="N",
        help=text,
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
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

    def command(name: str, run: str, text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        p.set_defaults(run=run, parser=p)
        return p

    p = command(
        "sites",
        "probes.analyses.extract:print_sites",
        "list the sites of a model, their widths and its attention",
    )
    p.add_argument("mllm", help="checkpoint directory or hub id; its weights are not loaded")
    add_image_px(p)

    text = "measure which tokens attend to which in each layer; status 1 where config and family claim otherwise"
    p = command("mask", "probes.analyses.extract:print_mask", text)
    p.add_argument("mllm", help="checkpoint directory or hub id; loaded in float32")
    text = "image attention that `probes` applies, instead of the model's own forward"
    p.add_argument("--image-attention", metavar="NAME", help=text)

    p = command(
        "states",
        "probes.analyses.extract:write_states",
        "write the states of images to a safetensors file",
    )
    p.add_argument("mllm", help="checkpoint directory or hub id")
    p.add_argument("image", nargs="+", help="image files")
    p.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help='.safetensors file with "SITE" f[images, T, d]',
    )
    text = "sites to write; `all` with the encoder's own layers in an MLLM (default: all others)"
    p.add_argument(
        "--sites",
        nargs="+",
        metavar="SITE",
        help=text,
    )
    p.add_argument(
        "--image-attention", metavar="NAME", help="image attention (default: the checkpoint's own)"
    )
    p.add_argument(
        "--prefix", metavar="TEXT", help="text before the image (default: from the chat template)"
    )
    add_image_px(p)
    add_overwrite(p)

    for name, analysis in ANALYSES.items():
        analysis.add_options(command(name, f"probes.analyses.{name}.run:run", analysis.help))

    p = command("segment", "probes.analyses.segment:run", "write the class maps of any photos")
    text = "folder of a finished probe run, unless it stands before the photos: probes segment RUN PHOTO ..."
    p.add_argument("--probes", metavar="RUN", help=text)
    p.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="image files with distinct names",
    )
    p.add_argument("--site", help="site of the probe (default: the run's best decoder layer)")
    text = "folder for NAME.png (class indices), NAME_overlay.png, legend.png and legend.json; only files that this "
    p.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help=text + "command has written are replaced",
    )

    text = "open a live page of running models: any photo by layer and patch, with patches blocked or replaced"
    p = command("lab", "probes.lab.command:run", text)
    text = "finished probe runs on the same images, one per mask or model, side by side"
    p.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help=text,
    )
    p.add_argument(
        "--mllm",
        metavar="DIR",
        help="checkpoint directory or hub id without probes: words and attention",
    )
    p.add_argument(
        "--port",
        type=int,
        default=8899,
        help="port of the page; 0 for any free one",
    )
    p.add_argument(
        "--host",
        metavar="ADDRESS",
        help="address to listen at, for other machines (default: 127.0.0.1)",
    )
    text = "folder below which painted photos are saved as data folders and opened again"
    p.add_argument(
        "--save",
        default="runs/lab",
        metavar="DIR",
        help=text,
    )

    text = "plant effects in models of a toy world and count how often each verdict says yes, where it should and not"
    p = command("calibrate", "llava_bidir.toy_world.calibrate:run", text)
    p.add_argument(
        "--out",
        default="runs/calibrate",
        metavar="DIR",
        help="folder of all seeds (default: %(default)s)",
    )
    text = "seeds to run; the table has all that are in DIR"
    p.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=list(range(10)),
        metavar="N",
        help=text,
    )
    text = "size of the world, see `llava-bidir demo-assets` (default: %(default)s)"
    p.add_argument(
        "--scale",
        type=float,
        default=0.1,
        metavar="X",
        help=text,
    )
    p.add_argument(
        "--scenes",
        type=int,
        choices=[2, 4],
        default=2,
        help="scenes in a picture (default: %(default)s)",
    )
    studies = ["planted", "weak", "random", "merged0", "merged1", "merged3"]
    p.add_argument(
        "--studies",
        nargs="+",
        choices=studies,
        metavar="NAME",
        help=f"some of {', '.join(studies)}",
    )

    text = "write claims, figures and tables of runs as one self-contained HTML page"
    p = command("report", "probes.report.page:run", text)
    text = "studies, or finished probe runs, one per model, dataset and mask, and their controls; "
    text += "NAME=RUN names the model"
    p.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help=text,
    )
    text = "folder for index.html, results.json, *.csv, *.png and *.pdf"
    p.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help=text,
    )
    text = "runs of other tasks than segmentation, and their controls with random weights; NAME=RUN names the model"
    p.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="RUN",
        help=text,
    )
    p.add_argument(
        "--timings", metavar="FILE", help='log with lines "start end step", to report the wall time'
    )
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
    args = build_parser().parse_args(argv)
    module, _, function = args.run.partition(":")
    getattr(import_module(module), function)(args)
