"""The `probes` command: all its options. What a command needs is imported when it runs."""

import argparse
import sys
from importlib import import_module

from llava_bidir.common.errors import one_line_errors

CONFIGURED = {  # commands that take YAML, with parsers of their own
    "fit": "train a probe at every site: -c configs/probes/ade20k.yaml --model.mllm DIR --data.root DIR --out RUN",
    "validate": "scores of a checkpoint's probes as they are",
    "test": "scores of a checkpoint's probes, each of its best epoch; writes the run's files",
    "verify-data": "read every image and mask before GPU time: -c configs/probes/ade20k.yaml --data.root DIR",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="probes", description="Where in an MLLM can its image tokens be segmented? (arXiv 2603.17228)"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in CONFIGURED.items():
        commands.add_parser(name, help=text, add_help=False)

    def command(name: str, run: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        return added

    sites = command("sites", "probes.analyses.extract:print_sites", "sites, grid, widths and attention of a model")
    sites.add_argument("mllm", help="checkpoint directory or hub id; its weights are not loaded")

    states = command(
        "states", "probes.analyses.extract:write_states", "states of images at every site, to a safetensors file"
    )
    states.add_argument("mllm", help="checkpoint directory or hub id")
    states.add_argument("image", nargs="+", help="image files")
    states.add_argument("--out", required=True, metavar="FILE", help='tensors "SITE" f[images, T, d]')
    states.add_argument("--sites", nargs="+", metavar="SITE", help="default: all")
    states.add_argument("--image-attention", metavar="NAME", help="another mask than the checkpoint's own")

    knockout = command(
        "knockout",
        "probes.analyses.knockout.run:run",
        "attention knockout (Eq. 1) and the wrong patches that remain (App. C.1), to RUN/knockout.json",
    )
    _add_run(knockout)
    knockout.add_argument(
        "--classes", required=True, nargs="+", metavar="NAME", help="classes c, or auto:N, the N most often wrong"
    )
    knockout.add_argument("--layers", nargs="+", type=int, metavar="L", help="decoder layers to cut, from 1 (all)")
    knockout.add_argument(
        "--labels-from", default="adapter", metavar="SITE", help="whose predictions say what is blocked (adapter)"
    )
    knockout.add_argument(
        "--anchors",
        choices=["predicted", "true"],
        default="predicted",
        help="block all that is predicted the class, as Eq. 1 (predicted), or only what is truly right or wrong (true)",
    )
    knockout.add_argument(
        "--controls",
        nargs="+",
        default=[],
        choices=["distance", "mass", "high_norm"],
        help="beside random tokens: others matched in distance, in attention mass; tokens of high norm (none)",
    )
    knockout.add_argument("--draws", type=int, default=5, help="of each control that draws tokens, averaged (5)")
    knockout.add_argument(
        "--doses", nargs="+", type=float, default=[], metavar="F", help="also block only these fractions (none)"
    )
    knockout.add_argument(
        "--reverse", action="store_true", help="also leave image tokens nothing but the classes' tokens to attend to"
    )
    knockout.add_argument(
        "--windows",
        type=int,
        metavar="K",
        help="also cut single layers, K in a row, from L on, up to L, to RUN/knockout_windows.json",
    )
    knockout.add_argument("--heads", action="store_true", help="also cut each head of each layer by itself, there too")
    knockout.add_argument("--attention", action="store_true", help="also say where wrong patches look, by layer")
    knockout.add_argument("--min-patches", type=int, default=1, help="leave out images with fewer wrong patches (1)")
    knockout.add_argument("--limit", type=int, help="look at no more than so many images")
    knockout.add_argument("--batch-size", type=int, default=64, help="images, or cases, of a forward (64)")
    _add_seed_and_out(knockout, "of the random controls and the bootstrap")

    starvation = command(
        "starvation",
        "probes.analyses.starvation.run:run",
        "accuracy by patch position, causal against bidirectional (Fig. 7, Table 3), to starvation.json",
    )
    starvation.add_argument(
        "--probes",
        required=True,
        nargs=2,
        metavar=("CAUSAL_RUN", "BIDIRECTIONAL_RUN"),
        help="folders of finished probe runs on the same images",
    )
    starvation.add_argument("--site", help="where to compare (default: the causal run's best decoder layer)")
    starvation.add_argument(
        "--by-class", action="store_true", help="also with the classes held fixed: early patches are mostly sky"
    )
    starvation.add_argument(
        "--flip",
        nargs="*",
        choices=["horizontal", "vertical", "rotate"],
        help="also on turned images (all three ways): is it the position that starves, or what images show there?",
    )
    _add_seed_and_out(starvation, "of the bootstrap")

    umap = command(
        "umap", "probes.analyses.umap:run", "patches of images in two dimensions, by site (Fig. 5), to RUN/umap.json"
    )
    _add_run(umap)
    umap.add_argument("--image", type=int, nargs="+", default=[0], metavar="I", help="indices in the validation split")
    umap.add_argument("--sites", nargs="+", metavar="SITE", help="default: adapter, half-way, best layer")
    umap.add_argument(
        "--tensorboard", action="store_true", help="also the states, for TensorBoard's projector, to RUN/projector"
    )
    _add_seed_and_out(umap, "of UMAP")

    maps = command(
        "maps",
        "probes.analyses.segmentation_maps:run",
        "predicted maps by site (Figs. 4, 13) and under knockout (Figs. 6, 12), to RUN/maps.safetensors",
    )
    _add_run(maps)
    maps.add_argument("--image", type=int, nargs="+", default=[0], metavar="I", help="indices in the validation split")
    maps.add_argument("--knockout", nargs="+", default=[], metavar="NAME", help="classes that RUN/knockout.json has")
    maps.add_argument("--out", metavar="DIR", help="where it goes (the run's folder)")

    segment = command("segment", "probes.analyses.segment:run", "segmentation maps of any photos, to OUT")
    _add_run(segment)
    segment.add_argument("photos", nargs="+", metavar="PHOTO", help="image files; their names must differ")
    segment.add_argument("--site", help="site of the probe (default: the run's best decoder layer)")
    segment.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="NAME.png (class indices), NAME_overlay.png, legend.png and legend.json; only files that this command "
        "has written are replaced",
    )

    explore = command(
        "explore",
        "probes.report.explorer.page:run",
        "a page to walk through images, layers and knockouts, patch by patch, to OUT/explorer.html",
    )
    explore.add_argument("runs", nargs="+", metavar="RUN", help="finished probe runs on the same images, one a mask")
    explore.add_argument(
        "--images", type=int, nargs="+", required=True, metavar="I", help="indices in the validation split"
    )
    explore.add_argument("--out", required=True, metavar="DIR", help="explorer.html, one file that needs no other")
    explore.add_argument(
        "--conditions",
        nargs="*",
        default=["incorrect", "correct"],
        metavar="NAME",
        help="knockouts to show: incorrect, correct, random_incorrect, random_correct (incorrect correct)",
    )
    explore.add_argument(
        "--knockout", nargs="+", metavar="NAME", help="classes whose mistakes they are about (an image's most frequent)"
    )
    explore.add_argument("--top-classes", type=int, default=3, metavar="N", help="most probable classes of a patch (3)")
    explore.add_argument("--top-words", type=int, default=3, metavar="N", help="most probable words of a patch (3)")
    explore.add_argument("--word-sites", nargs="*", metavar="SITE", help="where words are read (from the adapter on)")
    explore.add_argument("--seed", type=int, default=0, help="of the random controls (0)")

    report = command(
        "report", "probes.report.page:run", "claims, figures and tables of runs as one self-contained HTML page"
    )
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="finished probe runs: of each model and dataset one a mask, and their controls; NAME=RUN names the model",
    )
    report.add_argument("--out", required=True, metavar="DIR", help="index.html, results.json, *.csv, *.png, *.pdf")
    report.add_argument("--longer", nargs="+", default=[], metavar="RUN", help="the same with longer-trained probes")
    report.add_argument("--recipes", nargs="+", default=[], metavar="RUN", help="the same with further recipes")
    report.add_argument("--tensorboard", action="store_true", help="also the figures as events, to DIR/tensorboard")
    report.add_argument("--timings", metavar="FILE", help='log of lines "start end step", to state the wall time')
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--probes", required=True, metavar="RUN", help="folder of a finished probe run")


def _add_seed_and_out(parser: argparse.ArgumentParser, of_what: str) -> None:
    parser.add_argument("--seed", type=int, default=0, help=f"{of_what} (0)")
    parser.add_argument("--out", metavar="DIR", help="where it goes (the run's folder)")


def main(argv: list[str] | None = None) -> None:
    """Runs one command.

    Raises:
        SystemExit: Bad usage or bad input, with a message that says what was expected.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("probes"):
        if argv and argv[0] in CONFIGURED:
            module = "verify_data" if argv[0] == "verify-data" else "cli"
            import_module(f"probes.training.{module}").main(argv)
            return
        args = build_parser().parse_args(argv)
        module, _, function = args.run.partition(":")
        getattr(import_module(module), function)(args)
