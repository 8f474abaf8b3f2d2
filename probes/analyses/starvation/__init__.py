"""Context starvation: accuracy by patch position under two masks."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probes.analyses.base import Analysis, Claim, PlannedRun
from probes.analyses.options import add_fields, add_out, option, seed_option
from probes.models.sites import is_layer


@dataclass(frozen=True)
class StarvationOptions:
    """What to compare."""

    site: str | None = option(
        "site to compare at (default: the causal run's best decoder layer)", None
    )
    by_class: bool = option("also hold the classes fixed: early patches are mostly sky", False)
    seed: int = seed_option("the bootstrap")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes starvation`."""
    parser.add_argument(
        "--probes",
        required=True,
        nargs=2,
        metavar=("CAUSAL_RUN", "BIDIRECTIONAL_RUN"),
        help="folders of finished probe runs on the same images",
    )
    add_fields(parser, StarvationOptions)
    add_out(parser, "the bidirectional run's folder")


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, str]) -> str:
    """Return why two planned runs cannot be compared, the causal one first; "" if they can."""
    masks = [run.mask for run in runs]
    if masks != ["causal", "bidirectional"]:
        return f"the masks of the two models are {' and '.join(masks)}; it compares causal with bidirectional"
    if "site" not in options and not any(is_layer(site) for site in runs[0].sites):
        return "no probe at a decoder layer; choose another site by --add starvation.site=SITE"
    if len(runs[0].model_sites) != len(runs[1].model_sites):
        return "the two models differ in their number of layers"
    return ""


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
    lacks=lacks,
    claims={
        "starvation": Claim(
            +1,
            "Patch 0 starves under causal attention: bidirectional minus causal accuracy (Sec. 5.1)",
            "starvation, patch 0",
            between_masks="patch_0",
        ),
        "starvation_first_row": Claim(
            +1,
            "The first row starves under causal attention: bidirectional minus causal accuracy",
            "starvation, first row",
            between_masks="first_row",
        ),
    },
)
