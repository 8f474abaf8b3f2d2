"""Answers of the MLLM beside its probes at the same place, and under knockouts."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from probes.analyses.base import (
    Analysis,
    PlannedRun,
    Row,
    add_batch_size,
    add_draws,
    add_out,
    add_questions,
    add_run,
    add_seed,
    table_row,
)
from probes.models.sites import ADAPTER


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes answers`."""
    add_run(parser)
    add_questions(parser)
    add_draws(parser, 5)
    add_batch_size(parser, 16, "questions")
    add_seed(parser, "the controls and the bootstrap")
    add_out(parser)


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """Yield the accuracy of the answers."""
    yield table_row(
        None, "answer_accuracy", result["accuracy"]["value"], result["accuracy"]["ci95"]
    )


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, str]) -> str:
    """Return "no probe at the adapter" if a planned run has none."""
    if ADAPTER in runs[0].sites:
        return ""
    return "no probe at the adapter, whose predictions it hides (model.sites)"


ANALYSIS = Analysis(
    help="compare the model's answers about places with its probes, also under knockouts, into RUN/answers.json",
    question="Does the model say what its probes read, and does hiding tokens change what it says?",
    add_options=add_options,
    result="answers.json",
    title="Answers",
    arms=("trained", "random"),
    default=True,
    beside_data={"questions": ("questions.json", b'"regions"')},  # as demo-assets writes it
    rows=rows,
    lacks=lacks,
)
