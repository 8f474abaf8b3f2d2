"""The patches of images in two dimensions, site by site."""

import argparse
from collections.abc import Mapping, Sequence

from probes.analyses.base import Analysis, PlannedRun, add_images, add_out, add_run, add_seed
from probes.models.sites import ADAPTER, PATCHES, is_layer


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes umap`."""
    add_run(parser)
    add_images(parser, "--image", default=[0])
    text = "sites (default: adapter, half-way, best layer)"
    parser.add_argument(
        "--sites",
        nargs="+",
        metavar="SITE",
        help=text,
    )
    add_seed(parser, "UMAP")
    add_out(parser)


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, str]) -> str:
    """Return which of the default sites a planned run has no probe at, "" if none is missing."""
    sites = runs[0].sites
    start = ADAPTER if runs[0].has_llm else PATCHES
    if "sites" in options or (start in sites and any(is_layer(site) for site in sites)):
        return ""
    return f"no probes at {start} and a later layer; choose others by --add umap.sites=SITE,SITE"


ANALYSIS = Analysis(
    help="embed the patches of images in two dimensions, by site (Fig. 5), into RUN/umap.json",
    question="Do the patches of one class lie together, layer by layer? Illustrations, no evidence.",
    add_options=add_options,
    result="umap.json",
    title="UMAP of patches",
    paper="Sec. 3.3, Fig. 5",
    arms=("trained", "probes"),
    of_encoders=True,
    lacks=lacks,
)
