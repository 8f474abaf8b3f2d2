"""Which way an answer takes: text cut off from image tokens, and from other text, in windows of layers."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from probes.analyses.base import (
    Analysis,
    Claim,
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
    option,
    seed_option,
)


@dataclass(frozen=True)
class RoutesOptions(QuestionOptions):
    """What to ask, and what to cut."""

    window: int = option(
        "layers in a window; each window that fits is cut, and all layers at once",
        2,
        metavar="K",
    )
    stride: int = option(
        "layers from the first of a window to the first of the next one",
        1,
        at_least=1,
    )
    draws: int = draws_option(3)
    batch_size: int = batch_size_option(32, "questions, each under one knockout,")
    seed: int = seed_option("the random patches and the bootstrap")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probes routes`."""
    add_run(parser)
    add_fields(parser, RoutesOptions)
    add_out(parser)


def rows(result: dict[str, Any]) -> Iterator[Row]:
    """Yield the effect of each route, cut in all layers, in nats."""
    for effect in result["effects"]:
        of_all = effect["all"]
        metric = f"route_{effect['source']}_to_{effect['target']}".replace(" - ", "_minus_")
        yield table_row(None, metric, of_all["value"], of_all["ci95"])


ANALYSIS = Analysis(
    help="cut image, question and answer off from each other and ask the model, into RUN/routes.json",
    question="Which way does an answer take from the patches of its object to the last token?",
    add_options=add_options,
    result="routes.json",
    title="Routes of answers",
    arms=("trained", "random", "permuted"),
    beside_data={"questions": ("questions.json", b'"regions"')},  # as demo-assets writes it
    rows=rows,
    reads_probes=False,
    claims={
        "route_object": Claim(
            +1,
            "The answer is read from the object's patches: drop of the right answer's probability if no text attends "
            "to them, minus the drop for as many other patches",
            "read from the object",
        ),
    },
)
