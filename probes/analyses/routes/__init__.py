"""Answers beside probes, and which way they take: text cut off from image tokens, in windows of layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llava_bidir.common.cli import Count, Seed
from probes.analyses.base import Analysis, Claim, Row, table_row
from probes.analyses.fields import QuestionOptions


@dataclass(frozen=True, kw_only=True)
class RoutesOptions(QuestionOptions):
    """What to ask, and what to cut.

    Args:
        window: Layers in a window; each window that fits is cut, and all layers at once.
        stride: Layers from the first of a window to the first of the next one.
        draws: Draws to average for each condition with random tokens.
        batch_size: Questions, each under one knockout, per forward.
        seed: Random seed of the random patches and the bootstrap.
    """

    window: int = 2
    stride: Count = 1
    draws: Count = 3
    batch_size: Count = 32
    seed: Seed = 0


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """Yield the accuracy of the answers, and the effect of each route, cut in all layers, in nats."""
    accuracy = result["accuracy"]
    yield table_row(None, "answer_accuracy", accuracy["value"], accuracy["ci95"])
    for effect in result["effects"]:
        of_all = effect["all"]
        metric = f"route_{effect['source']}_to_{effect['target']}".replace(" - ", "_minus_")
        yield table_row(None, metric, of_all["value"], of_all["ci95"])


ANALYSIS = Analysis(
    help="ask the model about places, also with image, question and answer cut off from each other, into "
    "RUN/routes.json",
    question="Does the model say what its probes read, and which way does an answer take from the patches of its "
    "object to the last token?",
    options=RoutesOptions,
    result="routes.json",
    title="Answers and their routes",
    arms=("trained", "random", "permuted"),
    beside_data={"questions": ("questions.json", b'"regions"')},  # as demo-assets writes it
    rows=rows,
    claims={
        "route_object": Claim(
            +1,
            "The answer is read from the object's patches: drop of the right answer's probability if no text attends "
            "to them, minus the drop for as many other patches",
            "read from the object",
            reads_probes=False,
        ),
    },
)
