"""The `probes` command and its options. Each command's module is imported when the command runs."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from llava_bidir import __version__
from llava_bidir.common.configs import with_config_paths
from llava_bidir.common.errors import one_line_errors
from llava_bidir.common.option_names import check_option_names
from llava_bidir.common.short_help import ShortHelp, show_short_help
from llava_bidir.common.usage_errors import ArgumentParser

OPTIONS = Path(__file__).with_name("options.txt")  # of the commands in LIGHTNING_COMMANDS
LIGHTNING_COMMANDS = {  # their options are defined by LightningCLI
    "fit": "train a probe at every site: -c ade20k --model.mllm DIR --data.root DIR --out RUN",
    "solve": "solve a probe at every site from moments, at every strength of regularisation; options as for fit",
    "validate": "score the probes of a checkpoint as they are",
    "test": "score the probes of a checkpoint, each at its best epoch, and write the files of the run",
    "verify-data": "read every image and target before training: -c ade20k --data.root DIR",
}


RUN_OPTIONS = {
    "-c NAME": "config by name or path; later ones replace the values of earlier ones (`llava-bidir configs`)",
    "--model.mllm MODEL": "checkpoint directory or hub id",
    "--data.root DIR": "folder of images and masks (probes/README.md), or of the layout below",
    "--data.dataset NAME": "layout: folder, ade20k, voc2012, cityscapes, ... (default: folder)",
    "--data.task NAME": "segmentation, depth, normals or boundaries (default: segmentation)",
    "--data.batch_size N": "images per batch, of all devices together (default: 64)",
    "--model.image_attention NAME": "mask among image tokens; null keeps the model's own (default: null)",
    "--model.untrained LIST": "parts with random weights, for controls: [llm], [adapter], ... (default: null)",
    "--model.match NAME": "how a random LLM resembles the trained one: none, update, permuted (default: none)",
    "--model.draw N": "number of the random draw (default: 0)",
    "--out DIR": "folder of the run (default: runs/probes)",
    "--ckpt_path last": "resume an interrupted run, and leave a finished one alone",
    "--overwrite true": "replace the run that the folder holds (default: false)",
}
SOLVER_OPTIONS = {
    "--dry-run": "print memory and hours, measured on a few images",
    "--strengths R ...": "strengths of regularisation (default: the best one, searched in half decades)",
    "--passes N": "most passes over the training images (default: 8)",
    "--folds N": "folds of training images that choose the strength (default: 4)",
    "--sample-images N": "training images in memory (default: as many as fit into a quarter of it)",
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
        "Score the probes of a checkpoint as they are.", SCORE.replace("test", "validate"), RUN_OPTIONS
    ),
    "test": ShortHelp("Score each probe of a checkpoint at its best epoch, and write the files.", SCORE, RUN_OPTIONS),
}
OWN_PARSERS = {name: "probes.training.cli" for name in LIGHTNING_COMMANDS}
OWN_PARSERS |= {"verify-data": "probes.training.verify_data", "solve": "probes.training.solve"}
OWN_PARSERS |= {"study": "probes.studies.command"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = ArgumentParser(
        prog="probes", description="Layerwise segmentation probes for frozen MLLMs (arXiv 2603.17228)."
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
        "sites", "probes.analyses.extract:print_sites", "list the sites of a model, their widths and its attention"
    )
    p.add_argument("mllm", help="checkpoint directory or hub id; its weights are not loaded")

    p = command("states", "probes.analyses.extract:write_states", "write the states of images to a safetensors file")
    p.add_argument("mllm", help="checkpoint directory or hub id")
    p.add_argument("image", nargs="+", help="image files")
    p.add_argument("--out", required=True, metavar="FILE", help='.safetensors file with "SITE" f[images, T, d]')
    p.add_argument("--sites", nargs="+", metavar="SITE", help="sites to write (default: all)")
    p.add_argument("--image-attention", metavar="NAME", help="image attention (default: the checkpoint's own)")
    p.add_argument("--prefix", metavar="TEXT", help="text before the image (default: from the chat template)")
    _add_overwrite(p)

    text = "block image tokens (Eq. 1) and count the wrong patches that remain (App. C.1), into RUN/knockout.json"
    p = command("knockout", "probes.analyses.knockout.run:run", text)
    _add_run(p)
    text = "classes c, or auto:N for the N most often confused"
    p.add_argument("--classes", required=True, nargs="+", metavar="NAME", help=text)
    p.add_argument("--layers", nargs="+", type=int, metavar="L", help="layers to cut, counted from 1 (default: all)")
    text = "site whose predictions define the blocked tokens"
    p.add_argument("--block-by", default="adapter", metavar="SITE", help=text)
    text = "tokens to block: all predicted as the class (Eq. 1), or only those whose label confirms it"
    p.add_argument("--block-set", choices=["predicted", "correct"], default="predicted", help=text)
    text = "let blocked tokens still attend to themselves; Eq. 1 cuts them off from themselves, too"
    p.add_argument("--keep-own-key", action="store_true", help=text)
    text = "controls besides random tokens: matched in distance, in attention mass, or in both; tokens of high norm"
    controls = ["distance", "mass", "matched", "high_norm"]
    p.add_argument("--controls", nargs="+", default=[], choices=controls, help=text)
    p.add_argument("--draws", type=int, default=5, help="draws to average for each condition with random tokens")
    text = "also block random fractions of the tokens"
    p.add_argument("--fractions", nargs="+", type=float, default=[], metavar="F", help=text)
    text = "also let image tokens attend to no image tokens but the blocked sets"
    p.add_argument("--keep-only", action="store_true", help=text)
    text = (
        "also cut each layer alone, windows of K layers, all layers >= l, all layers <= l (RUN/knockout_windows.json)"
    )
    p.add_argument("--layer-windows", type=int, metavar="K", help=text)
    text = "also cut each attention head of each layer alone (RUN/knockout_windows.json)"
    p.add_argument("--attention-heads", action="store_true", help=text)
    p.add_argument("--attention", action="store_true", help="also measure where wrong patches attend, by layer")
    p.add_argument("--min-patches", type=int, default=1, help="leave out images with fewer wrong patches")
    p.add_argument("--limit", type=int, help="number of images to read (default: all)")
    p.add_argument("--batch-size", type=int, default=64, help="images, or cases, per forward")
    _add_seed_and_out(p, "the controls and the bootstrap")
    _add_overwrite(p)

    text = "compare the model's answers about places with its probes, also under knockouts, into RUN/answers.json"
    p = command("answers", "probes.analyses.answers.run:run", text)
    _add_run(p)
    text = "LLaVA's JSON with regions (default: questions.json beside the data set's folder, as demo-assets writes it)"
    p.add_argument("--questions", metavar="FILE", help=text)
    p.add_argument("--images", metavar="DIR", help="folder of the images (default: that of the questions)")
    p.add_argument("--limit", type=int, help="number of questions to ask (default: all)")
    p.add_argument("--draws", type=int, default=5, help="draws to average for each condition with random tokens")
    p.add_argument("--batch-size", type=int, default=16, help="questions per batch")
    _add_seed_and_out(p, "the controls and the bootstrap")
    _add_overwrite(p)

    text = (
        "replace states at one layer by those of another mask or picture, and read what follows, into RUN/patching.json"
    )
    p = command("patching", "probes.analyses.patching.run:run", text)
    _add_run(p)
    text = "mask under which replacement states are computed (default: bidirectional, or causal for a run that is not)"
    p.add_argument("--mask", metavar="NAME", help=text)
    text = "also patch pictures without a cue by those with it: a folder data set with the splits `with` and `without`"
    p.add_argument("--pairs", metavar="DIR", help=text)
    p.add_argument("--site", help="site of the read-out (default: the run's best decoder layer)")
    text = "layers whose states are replaced, 0 for the adapter (default: all before the read-out)"
    p.add_argument("--layers", nargs="+", type=int, metavar="L", help=text)
    p.add_argument("--limit", type=int, help="number of images, and of pairs, to read (default: all)")
    p.add_argument("--draws", type=int, default=3, help="draws of random tokens to average")
    p.add_argument("--batch-size", type=int, default=16, help="images per batch")
    _add_seed_and_out(p, "the random tokens and the bootstrap")
    _add_overwrite(p)

    text = "compare accuracy by patch position, causal against bidirectional (Fig. 7, Table 3), in starvation.json"
    p = command("starvation", "probes.analyses.starvation.run:run", text)
    text, runs = "folders of finished probe runs on the same images", ("CAUSAL_RUN", "BIDIRECTIONAL_RUN")
    p.add_argument("--probes", required=True, nargs=2, metavar=runs, help=text)
    p.add_argument("--site", help="site to compare at (default: the causal run's best decoder layer)")
    p.add_argument("--by-class", action="store_true", help="also hold the classes fixed: early patches are mostly sky")
    text = "also read flipped images, in all three ways if none is named, to separate position from content"
    p.add_argument("--flip", nargs="*", choices=["horizontal", "vertical", "rotate"], help=text)
    text = "also solve a probe for each position, to separate missing information from a shared probe's bias"
    p.add_argument("--own-probe", action="store_true", help=text)
    text = "also repeat the prompt's last token N times before the image: early patches may only lack a sink"
    p.add_argument("--dummy-tokens", type=int, default=0, metavar="N", help=text)
    _add_seed_and_out(p, "the bootstrap", "the bidirectional run's folder")
    _add_overwrite(p)

    text = "embed the patches of images in two dimensions, by site (Fig. 5), into RUN/umap.json"
    p = command("umap", "probes.analyses.umap:run", text)
    _add_run(p)
    _add_images(p, "--image", default=[0])
    p.add_argument("--sites", nargs="+", metavar="SITE", help="sites (default: adapter, half-way, best layer)")
    _add_seed_and_out(p, "UMAP")
    _add_overwrite(p)

    text = "predict maps by site (Figs. 4, 13) and under knockout (Figs. 6, 12), into RUN/maps.safetensors"
    p = command("maps", "probes.analyses.segmentation_maps:run", text)
    _add_run(p)
    _add_images(p, "--image", default=[0])
    text = "classes in RUN/knockout.json to show under knockout"
    p.add_argument("--classes", nargs="+", default=[], metavar="NAME", help=text)
    _add_out(p)
    _add_overwrite(p)

    p = command("segment", "probes.analyses.segment:run", "write the maps of any photos: classes, or another task")
    _add_run(p)
    p.add_argument("photos", nargs="+", metavar="PHOTO", help="image files with distinct names")
    p.add_argument("--site", help="site of the probe (default: the run's best decoder layer)")
    text = "folder for NAME.png (class indices, or values of another task), NAME_overlay.png or NAME_colours.png, "
    text += "legend.png and legend.json; only files that this "
    p.add_argument("--out", required=True, metavar="DIR", help=text + "command has written are replaced")

    text = "write a page of classes, words and knockouts by image, layer and patch, to OUT/explorer.html"
    p = command("explore", "probes.report.explorer.page:run", text)
    p.add_argument("runs", nargs="+", metavar="RUN", help="finished probe runs on the same images, one per mask")
    _add_images(p, "--images", required=True)
    p.add_argument("--out", required=True, metavar="DIR", help="folder for explorer.html, a self-contained file")
    text, sets = "knockouts to show, of incorrect, correct, random_incorrect, random_correct", ["incorrect", "correct"]
    p.add_argument("--conditions", nargs="*", default=sets, metavar="NAME", help=text)
    text = "wrong classes to knock out (default: each image's most frequent)"
    p.add_argument("--classes", nargs="+", metavar="NAME", help=text)
    p.add_argument("--top-classes", type=int, default=3, metavar="N", help="most probable classes per patch")
    p.add_argument("--top-words", type=int, default=3, metavar="N", help="most probable words per patch")
    p.add_argument(
        "--word-sites", nargs="*", metavar="SITE", help="sites with words (default: all from the adapter on)"
    )
    p.add_argument("--seed", type=int, default=0, help="random seed of the controls")

    text = "open a live page of running models: any photo by layer and patch, with patches blocked or replaced"
    p = command("lab", "probes.lab.command:run", text)
    text = "finished probe runs on the same images, one per mask or model, side by side"
    p.add_argument("runs", nargs="*", metavar="RUN", help=text)
    p.add_argument("--mllm", metavar="DIR", help="checkpoint directory or hub id without probes: words and attention")
    p.add_argument("--port", type=int, default=8899, help="port of the page; 0 for any free one")
    p.add_argument("--host", metavar="ADDRESS", help="address to listen at, for other machines (default: 127.0.0.1)")

    text = "write claims, figures and tables of runs as one self-contained HTML page"
    p = command("report", "probes.report.page:run", text)
    text = (
        "studies, or finished probe runs, one per model, dataset and mask, and their controls; NAME=RUN names the model"
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help=text)
    text = "folder for index.html, results.json, *.csv, *.png and *.pdf"
    p.add_argument("--out", required=True, metavar="DIR", help=text)
    text = "runs of other tasks than segmentation, and their controls with random weights; NAME=RUN names the model"
    p.add_argument("--tasks", nargs="+", default=[], metavar="RUN", help=text)
    p.add_argument("--timings", metavar="FILE", help='log with lines "start end step", to report the wall time')
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--probes", required=True, metavar="RUN", help="folder of a finished probe run")


def _add_images(parser: argparse.ArgumentParser, option: str, **kwargs) -> None:
    parser.add_argument(option, type=int, nargs="+", metavar="I", help="indices in the validation split", **kwargs)


def _add_out(parser: argparse.ArgumentParser, default: str = "the run's folder") -> None:
    parser.add_argument("--out", metavar="DIR", help=f"output folder (default: {default})")


def _add_seed_and_out(parser: argparse.ArgumentParser, purpose: str, out: str = "the run's folder") -> None:
    parser.add_argument("--seed", type=int, default=0, help=f"random seed of {purpose}")
    _add_out(parser, out)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    text = "`true`: replace a result that other options or runs have made"
    parser.add_argument("--overwrite", type=_read_bool, default="false", metavar="BOOL", help=text)


def _read_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text == "true"


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
            check_option_names(f"probes {argv[0]}", argv[1:], OPTIONS)
        run_command(argv)


def run_command(argv: list[str]) -> None:
    """Run one command; errors of its input are raised as `UserError`."""
    if argv[0] in OWN_PARSERS:
        import_module(OWN_PARSERS[argv[0]]).main(with_config_paths(argv))
        return
    args = build_parser().parse_args(argv)
    module, _, function = args.run.partition(":")
    getattr(import_module(module), function)(args)
