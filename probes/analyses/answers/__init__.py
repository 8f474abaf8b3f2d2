"""Answers of the MLLM beside its probes at the same place, and under knockouts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_bidir.common.options import Count, Seed
from probes.analyses.base import Analysis, PlannedRun, Row, table_row
from probes.analyses.fields import QuestionOptions
from probes.models.sites import ADAPTER


@dataclass(frozen=True, kw_only=True)
class AnswersOptions(QuestionOptions):
    """What to ask.

    Args:
        draws: Draws to average for each condition with random tokens.
        batch_size: Questions per forward.
        seed: Random seed of the controls and the bootstrap.
    """

    draws: Count = 5
    batch_size: Count = 16
    seed: Seed = 0


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """Yield the accuracy of the answers."""
    yield table_row(
        None, "answer_accuracy", result["accuracy"]["value"], result["accuracy"]["ci95"]
    )


def lacks(runs: Sequence[PlannedRun], options: Mapping[str, Any]) -> str:
    """Return "no probe at the adapter" if a planned run has none."""
    if ADAPTER in runs[0].sites:
        return ""
    return "no probe at the adapter, whose predictions it hides (model.sites)"


ANALYSIS = Analysis(
    help="compare the model's answers about places with its probes, also under knockouts, into RUN/answers.json",
    question="Does the model say what its probes read, and does hiding tokens change what it says?",
    options=AnswersOptions,
    result="answers.json",
    title="Answers",
    arms=("trained", "random"),
    default=True,
    beside_data={"questions": ("questions.json", b'"regions"')},  # as demo-assets writes it
    rows=rows,
    lacks=lacks,
)
