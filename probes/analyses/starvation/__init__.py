"""Context starvation: accuracy by patch position under two masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_bidir.common.cli import Seed
from probes.analyses.base import Analysis, Claim, PlannedRun
from probes.analyses.sinks import starts_with_sink
from probes.models.sites import is_layer

if TYPE_CHECKING:  # this module answers `probes --help`
    from probes.runs.finished_run import FinishedRun


@dataclass(frozen=True, kw_only=True)
class StarvationOptions:
    """What to compare.

    Args:
        probes: Folders of finished probe runs on the same images, the causal one first.
        out: Output folder (default: the bidirectional run's folder).
        overwrite: Replace a result that other options or runs have made.
        site: Site to compare at (default: the causal run's best decoder layer).
        by_class: Also hold the classes fixed: early patches are mostly sky.
        sinks: Also measure, with both models, whether the first image token is an attention sink.
        seed: Random seed of the bootstrap.
    """

    probes: tuple[Path, Path]
    out: Path | None = None
    overwrite: bool = False
    site: str | None = None
    by_class: bool = False
    sinks: bool = False
    seed: Seed = 0


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, Any]) -> str:
    """Return why two planned runs cannot be compared, the causal one first; "" if they can."""
    masks = [run.mask for run in runs]
    if masks != ["causal", "bidirectional"]:
        return f"the masks of the two models are {' and '.join(masks)}; it compares causal with bidirectional"
    if "site" not in options and not any(is_layer(site) for site in runs[0].sites):
        return "no probe at a decoder layer; choose another site by --add starvation.site=SITE"
    if len(runs[0].model_sites) != len(runs[1].model_sites):
        return "the two models differ in their number of layers"
    return ""


def sink_warning(starvation: Mapping[str, Any] | None) -> str:
    """Return what starvation.json says of an attention sink at the compared site; "" if there is none."""
    for mask, measured in (starvation or {}).get("sinks", {}).items():
        for layer in measured["layers"]:
            if layer["site"] == starvation["site"] and starts_with_sink(layer):
                return (
                    f"Under {mask} attention the first image token is an attention sink at {layer['site']}: its norm "
                    f"is {layer['first_norm']:.3g} times the median. Starvation is then not about context; see the "
                    "claim without this token."
                )
    return ""


def has_sink(runs: Mapping[str, "FinishedRun"]) -> bool:
    """Return whether a pair's runs by mask were found to have an attention sink at the first image token."""
    bidirectional = runs.get("bidirectional")
    return bool(bidirectional and sink_warning(bidirectional.analysis("starvation.json")))


ANALYSIS = Analysis(
    help="compare accuracy by patch position, causal against bidirectional (Fig. 7, Table 3), in starvation.json",
    question="Are early image tokens worse off under causal attention, since they attend to few others?",
    options=StarvationOptions,
    result="starvation.json",
    title="Context starvation",
    paper="Sec. 5.1, Fig. 7, Table 3",
    of="pair",
    in_study={"by_class": True, "sinks": True},
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
        "starvation_without_sink": Claim(
            +1,
            "The rest of the first row starves, too: bidirectional minus causal accuracy without its first patch, an "
            "attention sink",
            "starvation, first row without the sink",
            between_masks="rest_of_row",
            applies=has_sink,
        ),
    },
)
