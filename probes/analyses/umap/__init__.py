"""The patches of images in two dimensions, site by site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from llava_bidir.common.cli import Indices, Seed
from probes.analyses.base import Analysis, PlannedRun
from probes.analyses.fields import RunOptions
from probes.models.sites import ADAPTER, PATCHES, is_layer


@dataclass(frozen=True, kw_only=True)
class UmapOptions(RunOptions):
    """What to embed.

    Args:
        image: Indices in the validation split.
        sites: Sites (default: adapter, half-way, best layer).
        seed: Random seed of UMAP.
    """

    image: Indices = (0,)
    sites: tuple[str, ...] | None = None
    seed: Seed = 0


def lacks_package() -> str:
    """Return how to install what projects the patches, "" if it is installed."""
    if find_spec("umap") is None:
        return "umap-learn is not installed; run: pip install 'llava-bidir[figures]'"
    return ""


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, Any]) -> str:
    """Return that the package, or the probe of a planned run at a default site, is missing, "" if none is."""
    if missing := lacks_package():
        return missing
    sites = runs[0].sites
    start = ADAPTER if runs[0].has_llm else PATCHES
    if "sites" in options or (start in sites and any(is_layer(site) for site in sites)):
        return ""
    return f"no probes at {start} and a later layer; choose others by --add umap.sites=SITE,SITE"


ANALYSIS = Analysis(
    help="embed the patches of images in two dimensions, by site (Fig. 5), into RUN/umap.json",
    question="Do the patches of one class lie together, layer by layer? Illustrations, no evidence.",
    options=UmapOptions,
    result="umap.json",
    title="UMAP of patches",
    paper="Sec. 3.3, Fig. 5",
    arms=("trained", "probes"),
    of_encoders=True,
    lacks=lacks,
)
