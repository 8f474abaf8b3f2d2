"""Attention knockout of confused image patches: cases, blocked tokens, forwards, effects (Eq. 1, App. C.1)."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probes.analyses.base import (
    Analysis,
    Claim,
    PlannedRun,
    Row,
    lacks_layers,
    table_row,
)
from probes.analyses.options import (
    add_fields,
    add_out,
    add_run,
    batch_size_option,
    draws_option,
    option,
    seed_option,
)
from probes.models.sites import ADAPTER

from .schema import CONTROLS


@dataclass(frozen=True)
class KnockoutOptions:
    """What to run for each case; knockout.json has all of it."""

    classes: Sequence[str] = option(
        "classes c, or auto:N for the N most often confused",
        metavar="NAME",
    )
    layers: Sequence[int] | None = option(
        "layers to cut, counted from 1 (default: all)",
        None,
        metavar="L",
    )
    block_by: str = option(
        "site whose predictions define the blocked tokens",
        ADAPTER,
        metavar="SITE",
    )
    min_patches: int = option("leave out images with fewer wrong patches", 1, at_least=1)
    limit: int | None = option("number of images to read (default: all)", None, at_least=1)
    batch_size: int = batch_size_option(64, "images, or cases,")
    controls: Sequence[str] = option(
        "controls besides random tokens: tokens matched in distance and attention received",
        (),
        choices=CONTROLS[1:],
    )
    draws: int = draws_option(5)
    layer_windows: int | None = option(
        "also cut each layer alone, windows of K layers, all layers >= l, all layers <= l (RUN/knockout_windows.json)",
        None,
        metavar="K",
    )
    seed: int = seed_option("the controls and the bootstrap")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes knockout`."""
    add_run(parser)
    add_fields(parser, KnockoutOptions)
    add_out(parser)


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


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, str]) -> str:
    """Return which layers a planned run has no probes at, "" if none is missing."""
    return lacks_layers(runs[0])


ANALYSIS = Analysis(
    help="block image tokens (Eq. 1) and count the wrong patches that remain (App. C.1), into RUN/knockout.json",
    question="Do correctly classified image tokens pull misclassified ones to the right class in the LLM?",
    add_options=add_options,
    result="knockout.json",
    title="Attention knockout",
    paper="Sec. 4, App. C.1, Fig. 11",
    options={"classes": "auto:4"},
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
