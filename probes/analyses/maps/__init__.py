"""Predicted maps by site, and under knockout."""

import argparse

from probes.analyses.base import Analysis, add_images, add_out, add_run


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes maps`."""
    add_run(parser)
    add_images(parser, "--image", default=[0])
    text = "classes in RUN/knockout.json to show under knockout"
    parser.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="NAME",
        help=text,
    )
    add_out(parser)


ANALYSIS = Analysis(
    help="predict maps by site (Figs. 4, 13) and under knockout (Figs. 6, 12), into RUN/maps.safetensors",
    question="What do the probes predict on single images, layer by layer? Illustrations, no evidence.",
    add_options=add_options,
    result="maps.json",
    title="Predicted segmentation maps",
    paper="Figs. 4, 6, 12, 13",
    options={"image": "0,1,2,3"},
    arms=("trained", "probes"),
    of_encoders=True,
)
