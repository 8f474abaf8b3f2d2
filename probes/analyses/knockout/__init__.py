"""Attention knockout of confused image patches: cases, blocked tokens, forwards, effects (Eq. 1, App. C.1)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_bidir.common.cli import Count, Seed
from probes.analyses.base import Analysis, Claim, PlannedRun, Row, lacks_layers, table_row
from probes.analyses.fields import RunOptions
from probes.models.sites import ADAPTER


@dataclass(frozen=True, kw_only=True)
class KnockoutOptions(RunOptions):
    """What to run for each case; knockout.json has all of it.

    Args:
        classes: Classes c, or auto:N for the N most often confused.
        layers: Layers to cut, counted from 1 (default: all).
        block_by: Site whose predictions define the blocked tokens.
        min_patches: Leave out images with fewer wrong patches.
        limit: Number of images to read (default: all).
        batch_size: Images, or cases, per forward.
        draws: Draws to average for each condition with random tokens.
        seed: Random seed of the controls and the bootstrap.
    """

    classes: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    block_by: str = ADAPTER
    min_patches: Count = 1
    limit: Count | None = None
    batch_size: Count = 64
    draws: Count = 5
    seed: Seed = 0


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """Yield the share of wrong patches left, by class, condition and site."""
    for entry in result["classes"]:
        for condition, values in entry["remaining"].items():
            for layer, (value, interval) in enumerate(
                zip(values, entry["ci95"][condition], strict=True)
            ):
                site = "adapter" if layer == 0 else f"layer_{layer:02d}"
                of = {"class": entry["class"], "condition": condition}
                yield table_row(site, "wrong_patches_left", value, interval, **of)


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, Any]) -> str:
    """Return which layers a planned run has no probes at, "" if none is missing."""
    return lacks_layers(runs[0])


ANALYSIS = Analysis(
    help="block image tokens (Eq. 1) and count the wrong patches that remain (App. C.1), into RUN/knockout.json",
    question="Do correctly classified image tokens pull misclassified ones to the right class in the LLM?",
    options=KnockoutOptions,
    result="knockout.json",
    title="Attention knockout",
    paper="Sec. 4, App. C.1, Fig. 11",
    in_study={"classes": ("auto:4",)},
    arms=("trained", "random", "permuted", "probes"),
    default=True,
    claims={
        "knockout_incorrect": Claim(
            -1,
            "Blocking the wrong class speeds correction: change in wrong patches left (Sec. 4.1)",
            "wrong class blocked",
            against_tokens=True,
        ),
        "knockout_correct": Claim(
            +1,
            "Blocking the correct class impairs correction: change in wrong patches left (Sec. 4.2)",
            "correct class blocked",
            against_tokens=True,
        ),
        "knockout_specificity": Claim(
            +1,
            "The effect is class-specific: correct minus wrong class, less the same at random",
            "correct − wrong blocked",
            against_tokens=True,
        ),
    },
    rows=rows,
    lacks=lacks,
)
