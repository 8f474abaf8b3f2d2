"""Options of a study with its models and data, from words and from values. Nothing here imports torch or Lightning."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_bidir.common.cli import Parser
from llava_bidir.common.errors import UserError
from probes.config import StudyOptions, split_label

RESERVED = ("report", "steps")  # folders of a study


def study_options(
    models: Mapping[str, str],
    data: str,
    *,
    configs: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> StudyOptions:
    """Return a study of models on a folder of images and masks, or on a layout.

    Args:
        models: Checkpoint directory or hub id by label.
        data: The folder, or the name of a layout, whose folder the options give.
        configs: Names or paths of YAML files for the probe runs.
        options: Options of the probe runs, nested as in YAML: {"data": {"batch_size": 2}}.
        **settings: The study's own: draws, arms, ...

    Raises:
        UserError: An option is unknown or invalid.
    """
    words = [f"--config={name}" for name in configs]
    values = {"inputs": [data], **(options or {}), **settings}
    study = Parser(StudyOptions).read(words, values)
    return with_inputs(study, models, data)


def with_inputs(study: StudyOptions, models: Mapping[str, str], data: str) -> StudyOptions:
    """Return a study with models by label, and a folder of images and masks, or a layout whose folder it has.

    Raises:
        UserError: The folder of a layout is missing, a model is given as an option, or a label cannot be the name
            of its folder.
    """
    from probes.data.registry import DATASETS  # torch

    if study.model.mllm:
        raise UserError(
            f"--model.mllm {study.model.mllm}: the models of a study are words, MODEL DATA"
        )
    study = replace(study, models=dict(models))
    if data not in DATASETS:
        where = {"root": data}
    elif study.data.root:
        where = {"dataset": data, "name": study.data.name or data}
    else:
        raise UserError(f"{data} is a layout, and its folder is missing (--data.root DIR)")
    for label in study.labels:
        if label in RESERVED or Path(label).name != label:
            raise UserError(
                f"{label!r} cannot be the label of a model: expected the name of a folder, not "
                f"{' or '.join(RESERVED)}"
            )
    return replace(study, data=replace(study.data, **where))


def label_models(words: Sequence[str], trust: bool = False) -> dict[str, str]:
    """Return the models by label, in the order given: "" for one, else the text before "=".

    Two without labels are named by their masks, which may be run if they are trusted.

    Raises:
        UserError: Two models have one label, or a model of several has none.
    """
    models: dict[str, str] = {}
    for text in words:
        label, model = split_label(text)
        if len(words) == 2 and not label:
            from probes.models.families import own_image_attention
            from probes.models.read_config import read_config

            label = own_image_attention(read_config(model, trust=trust))
        if len(words) > 1 and not label:
            raise UserError(f"{model} has no label; name each of several models: NAME={model}")
        if label in models:
            raise UserError(
                f"{models[label]} and {model} are both called {label!r}; name them: first=DIR second=DIR"
            )
        models[label] = model
    return models
