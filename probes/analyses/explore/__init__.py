"""A page of classes, words and knockouts by image, layer and patch."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from probes.analyses.base import Analysis
from probes.analyses.options import add_fields, images_option, option, seed_option


@dataclass(frozen=True)
class ExploreOptions:
    """What the page shows."""

    images: Sequence[int] = images_option()
    conditions: Sequence[str] = option(
        "knockouts to show, of incorrect, correct, random_incorrect, random_correct",
        ("incorrect", "correct"),
        metavar="NAME",
        may_be_empty=True,
    )
    classes: Sequence[str] | None = option(
        "wrong classes to knock out (default: each image's most frequent)",
        None,
        metavar="NAME",
    )
    top_classes: int = option(
        "most probable classes per patch",
        3,
        metavar="N",
    )
    top_words: int = option(
        "most probable words per patch",
        3,
        metavar="N",
    )
    word_sites: Sequence[str] | None = option(
        "sites with words (default: all from the adapter on)",
        None,
        metavar="SITE",
        may_be_empty=True,
    )
    seed: int = seed_option("the controls")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes explore`."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="finished probe runs on the same images, one per mask",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for explorer.html, a self-contained file",
    )
    add_fields(parser, ExploreOptions)


ANALYSIS = Analysis(
    help="write a page of classes, words and knockouts by image, layer and patch, to OUT/explorer.html",
    question="What do probes and logit lens read at a patch, and what does a knockout change there?",
    add_options=add_options,
    result="explorer.html",
    of="page",
    reads=("knockout",),
    options={"images": ",".join(map(str, range(12)))},
)
