"""Answers of the MLLM beside its probes at the same place, and under knockouts."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probes.analyses.base import (
    Analysis,
    PlannedRun,
    Row,
    table_row,
)
from probes.analyses.options import (
    QuestionOptions,
    add_fields,
    add_out,
    add_run,
    batch_size_option,
    draws_option,
    seed_option,
)
from probes.models.sites import ADAPTER


@dataclass(frozen=True)
class AnswersOptions(QuestionOptions):
    """What to ask."""

    draws: int = draws_option(5)
    batch_size: int = batch_size_option(16, "questions")
    seed: int = seed_option("the controls and the bootstrap")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes answers`."""
    add_run(parser)
    add_fields(parser, AnswersOptions)
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
