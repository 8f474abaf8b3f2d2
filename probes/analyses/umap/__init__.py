"""The patches of images in two dimensions, site by site."""

import argparse

from probes.analyses.base import Analysis, add_images, add_out, add_run, add_seed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes umap`."""
    add_run(parser)
    add_images(parser, "--image", default=[0])
    text = "sites (default: adapter, half-way, best layer)"
    parser.add_argument("--sites", nargs="+", metavar="SITE", help=text)
    add_seed(parser, "UMAP")
    add_out(parser)


ANALYSIS = Analysis(
    help="embed the patches of images in two dimensions, by site (Fig. 5), into RUN/umap.json",
    question="Do the patches of one class lie together, layer by layer? Illustrations, no evidence.",
    add_options=add_options,
    result="umap.json",
    title="UMAP of patches",
    paper="Sec. 3.3, Fig. 5",
    arms=("trained", "probes"),
)
