"""Context starvation: are early patches worse off under causal attention (Sec. 5.1, Fig. 7, Table 3)?

Image tokens come in raster order. Under a causal mask, patch 0 attends to no other patch and the last one to all. The
report compares each other mask with the first by pixel accuracy under each patch at one site (starvation_section.py).
The first token may also be an attention sink (sinks.py).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from probes.analyses.analysis import Analysis, Claim
from probes.analyses.sinks import sinks_of, starts_with_sink

if TYPE_CHECKING:  # this module answers `probes --help`
    from probes.runs.read import ProbeRun


def sink_warning(runs: Mapping[str, "ProbeRun"], site: str) -> str:
    """Return that the first image token is a sink at a site, in a sentence about a run by mask; "" if there is none."""
    for mask, run in runs.items():
        for layer in sinks_of(run)["layers"]:
            if layer["site"] == site and starts_with_sink(layer):
                return (
                    f"Under {mask} attention the first image token is an attention sink at {site}: its norm is "
                    f"{layer['first_norm']:.3g} times the median. Starvation is then not about context; see the claim "
                    "without this token."
                )
    return ""


def has_sink(runs: Mapping[str, "ProbeRun"]) -> bool:
    """Return whether two runs by mask have a sink at the first image token, at the best layer of the first one."""
    first, *others = runs.values()
    return bool(others) and bool(sink_warning(runs, first.peak_layer))


ANALYSIS = Analysis(
    name="starvation",
    question="Are early image tokens worse off under causal attention, since they attend to few others?",
    title="Patches",
    section="probes.analyses.starvation.starvation_section:section",
    paper="Sec. 5.1, Fig. 7, Table 3",
    claims={
        "starvation": Claim(
            +1,
            "First patch starves under {first} attention: {second} − {first}, accuracy",
            between_masks="patch_0",
        ),
        "starvation_first_row": Claim(
            +1,
            "First row starves under {first} attention: {second} − {first}, accuracy",
            between_masks="first_row",
        ),
        "starvation_without_sink": Claim(
            +1,
            "First row starves, without its first patch, a sink: {second} − {first}, accuracy",
            between_masks="rest_of_row",
            applies=has_sink,
        ),
    },
)
