"""Activation patching: states replaced at one layer by those of another mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_bidir.common.cli import Count, Seed
from probes.analyses.base import Analysis, PlannedRun
from probes.analyses.fields import RunOptions
from probes.models.sites import FINAL_NORM, is_layer


@dataclass(frozen=True, kw_only=True)
class PatchingOptions(RunOptions):
    """What to patch.

    Args:
        site: Site of the read-out (default: the run's best decoder layer).
        mask: Mask under which replacement states are computed (default: bidirectional, or causal for a run that is
            not).
        layers: Layers whose states are replaced, 0 for the adapter (default: all before the read-out).
        limit: Number of images to read (default: all).
        draws: Draws to average for each condition with random tokens.
        batch_size: Images per forward.
        seed: Random seed of the random tokens and the bootstrap.
    """

    site: str | None = None
    mask: str | None = None
    layers: tuple[int, ...] | None = None
    limit: Count | None = None
    draws: Count = 3
    batch_size: Count = 16
    seed: Seed = 0


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, Any]) -> str:
    """Return "no probe after the adapter" if a planned run has none to read out; "" if it has."""
    sites = runs[0].sites
    later = [site for site in sites if is_layer(site) or site == FINAL_NORM]
    return "" if later else "no probe after the adapter, which is the read-out (model.sites)"


ANALYSIS = Analysis(
    help="replace states at one layer by those of another mask, and read what follows, into RUN/patching.json",
    question="In which layers do tokens receive what they need from others, and at which do others still read it?",
    options=PatchingOptions,
    result="patching.json",
    title="Activation patching",
    lacks=lacks,
)
