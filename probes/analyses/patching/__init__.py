"""Activation patching: states replaced at one layer by those of another mask or picture."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from probes.analyses.base import Analysis, PlannedRun
from probes.analyses.options import (
    add_fields,
    add_out,
    add_run,
    batch_size_option,
    draws_option,
    option,
    seed_option,
)
from probes.models.sites import ADAPTER, is_before_adapter


@dataclass(frozen=True)
class PatchingPlan:
    """What to patch."""

    site: str | None = option("site of the read-out (default: the run's best decoder layer)", None)
    mask: str | None = option(
        "mask under which replacement states are computed (default: bidirectional, or causal for a run that is not)",
        None,
        metavar="NAME",
    )
    layers: Sequence[int] | None = option(
        "layers whose states are replaced, 0 for the adapter (default: all before the read-out)",
        None,
        metavar="L",
    )
    limit: int | None = option(
        "number of images, and of pairs, to read (default: all)",
        None,
        at_least=1,
    )
    draws: int = draws_option(3)
    batch_size: int = batch_size_option(16, "images")
    seed: int = seed_option("the random tokens and the bootstrap")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes patching`."""
    add_run(parser)
    text = "also patch pictures without a cue by those with it: a folder data set with the splits `with` and `without`"
    parser.add_argument("--pairs", metavar="DIR", help=text)
    add_fields(parser, PatchingPlan)
    add_out(parser)


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, str]) -> str:
    """Return "no probe after the adapter" if a planned run has none to read out; "" if it has."""
    sites = runs[0].sites
    later = [site for site in sites if site != ADAPTER and not is_before_adapter(site)]
    return "" if later else "no probe after the adapter, which is the read-out (model.sites)"


ANALYSIS = Analysis(
    help="replace states at one layer by those of another mask or picture, and read what follows, into "
    "RUN/patching.json",
    question="In which layers do tokens receive what they need from others, and at which do others still read it?",
    add_options=add_options,
    result="patching.json",
    title="Activation patching",
    lacks=lacks,
)
