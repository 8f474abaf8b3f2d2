"""What a study is made of, as values. Nothing here imports torch or Lightning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.options import flag
from probes.run_config import RunConfig

RESERVED = ("report", "steps")  # folders of a study


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of a study beside those of its probe runs.

    Args:
        out: Folder of the study.
        draws: Draws of random LLMs, and of random adapters; of a bare encoder, of random layers. At most two are also
            permuted.
        arms: Arms to solve: trained, random0, adapter0, permuted0, untrained0, ... (default: trained and all draws).
        fit: Also train probes, as the paper does.
        tasks: Other tasks, each solved on all arms: depth, normals, boundaries.
        add: Further analyses, by the names of their commands, or options of one: knockout.classes=sky,road.
        only: Only these kinds of steps: solve, fit, report, or an analysis.
    """

    out: Path
    draws: int = 3
    arms: tuple[str, ...] | None = None
    fit: bool = flag()
    tasks: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class StudyConfig(StudyOptions):
    """All that a study is made of.

    Args:
        models: Checkpoint directory or hub id by label. One model has the label "".
        probes: Options of the probe runs; each arm has a model, weights and a folder of its own.
    """

    models: dict[str, str]
    probes: RunConfig


def check_label(label: str) -> None:
    """Raise a UserError if a model's label cannot be the name of its folder in a study."""
    if label in RESERVED or Path(label).name != label:
        raise UserError(
            f"{label!r} cannot be the label of a model: expected the name of a folder, not {' or '.join(RESERVED)}"
        )


def label_models(words: Sequence[str]) -> dict[str, str]:
    """Return the models by label, in the order given: "" for one, else the text before "=".

    Two without labels are named by their masks, the two conditions of the paper.

    Raises:
        UserError: Two models have one label, or a model of several has none.
    """
    pairs = [
        text.split("=", 1) if "=" in text and not Path(text).exists() else ["", text]
        for text in words
    ]
    if len(pairs) == 2 and not all(label for label, _ in pairs):
        from probes.models.families import own_image_attention
        from probes.models.read_config import read_config

        pairs = [
            [label or own_image_attention(read_config(model)), model] for label, model in pairs
        ]
    models = {}
    for label, model in pairs:
        if len(pairs) > 1 and not label:
            raise UserError(f"{model} has no label; name each of several models: NAME={model}")
        check_label(label)
        if label in models:
            raise UserError(
                f"{models[label]} and {model} are both called {label!r}; name them: first=DIR second=DIR"
            )
        models[label] = model
    return models
