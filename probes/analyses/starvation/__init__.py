"""Context starvation: accuracy by patch position under two masks."""

import argparse

from probes.analyses.base import Analysis, Claim, add_out, add_seed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes starvation`."""
    text, runs = "folders of finished probe runs on the same images", ("CAUSAL_RUN", "BIDIRECTIONAL_RUN")
    parser.add_argument("--probes", required=True, nargs=2, metavar=runs, help=text)
    parser.add_argument("--site", help="site to compare at (default: the causal run's best decoder layer)")
    text = "also hold the classes fixed: early patches are mostly sky"
    parser.add_argument("--by-class", action="store_true", help=text)
    text = "also read flipped images, in all three ways if none is named, to separate position from content"
    parser.add_argument("--flip", nargs="*", choices=["horizontal", "vertical", "rotate"], help=text)
    add_seed(parser, "the bootstrap")
    add_out(parser, "the bidirectional run's folder")


ANALYSIS = Analysis(
    help="compare accuracy by patch position, causal against bidirectional (Fig. 7, Table 3), in starvation.json",
    question="Are early image tokens worse off under causal attention, since they attend to few others?",
    add_options=add_options,
    result="starvation.json",
    title="Context starvation",
    paper="Sec. 5.1, Fig. 7, Table 3",
    of="pair",
    options={"by-class": "true"},
    arms=("trained", "probes"),
    default=True,
    claims={
        "starvation": Claim(
            +1,
            "Patch 0 starves under causal attention: bidirectional minus causal accuracy (Sec. 5.1)",
            "starvation, patch 0",
        ),
        "starvation_first_row": Claim(
            +1,
            "The first row starves under causal attention: bidirectional minus causal accuracy",
            "starvation, first row",
        ),
    },
)
