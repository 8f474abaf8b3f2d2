"""Predicted maps by site, and under knockout."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from probes.analyses.base import Analysis
from probes.analyses.options import add_fields, add_out, add_run, images_option, option


@dataclass(frozen=True)
class MapsOptions:
    """What to show."""

    image: Sequence[int] = images_option((0,))
    classes: Sequence[str] = option(
        "classes in RUN/knockout.json to show under knockout",
        (),
        metavar="NAME",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes maps`."""
    add_run(parser)
    add_fields(parser, MapsOptions)
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
    reads=("knockout",),
    of_encoders=True,
)
