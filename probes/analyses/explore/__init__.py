"""A page of classes, words and knockouts by image, layer and patch."""

import argparse

from probes.analyses.base import Analysis, add_images


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes explore`."""
    text = "finished probe runs on the same images, one per mask"
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help=text,
    )
    add_images(parser, "--images", required=True)
    text = "folder for explorer.html, a self-contained file"
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help=text,
    )
    text = "knockouts to show, of incorrect, correct, random_incorrect, random_correct"
    sets = ["incorrect", "correct"]
    parser.add_argument(
        "--conditions",
        nargs="*",
        default=sets,
        metavar="NAME",
        help=text,
    )
    text = "wrong classes to knock out (default: each image's most frequent)"
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help=text,
    )
    parser.add_argument(
        "--top-classes",
        type=int,
        default=3,
        metavar="N",
        help="most probable classes per patch",
    )
    parser.add_argument(
        "--top-words",
        type=int,
        default=3,
        metavar="N",
        help="most probable words per patch",
    )
    text = "sites with words (default: all from the adapter on)"
    parser.add_argument(
        "--word-sites",
        nargs="*",
        metavar="SITE",
        help=text,
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the controls",
    )


ANALYSIS = Analysis(
    help="write a page of classes, words and knockouts by image, layer and patch, to OUT/explorer.html",
    question="What do probes and logit lens read at a patch, and what does a knockout change there?",
    add_options=add_options,
    result="explorer.html",
    of="page",
    options={"images": ",".join(map(str, range(12)))},
)
