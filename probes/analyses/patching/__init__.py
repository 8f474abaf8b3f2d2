"""Activation patching: states replaced at one layer by those of another mask or picture."""

import argparse
from collections.abc import Mapping, Sequence

from probes.analyses.base import (
    Analysis,
    PlannedRun,
    add_batch_size,
    add_draws,
    add_out,
    add_run,
    add_seed,
)
from probes.models.sites import ADAPTER, is_before_adapter


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes patching`."""
    add_run(parser)
    text = "mask under which replacement states are computed (default: bidirectional, or causal for a run that is not)"
    parser.add_argument("--mask", metavar="NAME", help=text)
    text = "also patch pictures without a cue by those with it: a folder data set with the splits `with` and `without`"
    parser.add_argument("--pairs", metavar="DIR", help=text)
    parser.add_argument(
        "--site", help="site of the read-out (default: the run's best decoder layer)"
    )
    text = "layers whose states are replaced, 0 for the adapter (default: all before the read-out)"
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        metavar="L",
        help=text,
    )
    parser.add_argument(
        "--limit", type=int, help="number of images, and of pairs, to read (default: all)"
    )
    add_draws(parser, 3)
    add_batch_size(parser, 16, "images")
    add_seed(parser, "the random tokens and the bootstrap")
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
