"""Predicted maps by site, and under knockout."""

from dataclasses import dataclass

from llava_bidir.common.cli import Indices
from probes.analyses.base import Analysis
from probes.analyses.fields import RunOptions


@dataclass(frozen=True, kw_only=True)
class MapsOptions(RunOptions):
    """What to show.

    Args:
        image: Indices in the validation split.
        classes: Classes in RUN/knockout.json to show under knockout.
    """

    image: Indices = (0,)
    classes: tuple[str, ...] = ()


ANALYSIS = Analysis(
    help="predict maps by site (Figs. 4, 13) and under knockout (Figs. 6, 12), into RUN/maps.safetensors",
    question="What do the probes predict on single images, layer by layer? Illustrations, no evidence.",
    options=MapsOptions,
    result="maps.json",
    title="Predicted segmentation maps",
    paper="Figs. 4, 6, 12, 13",
    in_study={"image": (0, 1, 2, 3)},
    arms=("trained", "probes"),
    reads=("knockout",),
    of_encoders=True,
)
