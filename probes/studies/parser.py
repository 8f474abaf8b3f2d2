"""Parsers of `probes study`: of its own options, and of those of its probe runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jsonargparse

from llava_bidir.common.options import add_options, options_from
from probes.run_config import RunConfig
from probes.run_parser import RunParser

from .config import StudyConfig, StudyOptions

DESCRIPTION = (
    "Solve the probes of a model and of its random controls, run the analyses, and write a report with verdicts. "
    "What is finished is not done again: repeat the command after a kill, or with more draws."
)
EXAMPLE = "probes study llava-hf/llava-1.5-7b-hf photos --out runs/photos"
INPUTS = (
    "checkpoint directory or hub id, or several as NAME=DIR, each compared with the first; then a folder of images and "
    "masks (probes/README.md), or the name of a layout (ade20k, with --data.root DIR)"
)
SET_BY_STUDY = ("model.mllm", "out", "overwrite", "ckpt_path")


def build_parser() -> RunParser:
    """Return the parser of the options of the probe runs of a study."""
    return RunParser(
        "probes study",
        DESCRIPTION,
        EXAMPLE,
        optional=["data.root"],
        without=SET_BY_STUDY,
    )


def build_command_parser() -> RunParser:
    """Return the parser of the command: its inputs, the study's own options, and those of its probe runs."""
    parser = build_parser()
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="MODEL ... DATA",
        help=INPUTS,
    )
    add_options(parser, StudyOptions)
    text = "print the steps, time, disk and detectable effect"
    parser.add_argument("--dry-run", action="store_true", help=text)
    text = "replace results that other settings, models or images have made"
    parser.add_argument(
        "--overwrite",
        type=bool,
        default=False,
        help=text,
    )
    return parser


def probe_config(
    parser: RunParser,
    values: jsonargparse.Namespace,
    data: str,
    models: Mapping[str, str],
) -> RunConfig:
    """Return the options of the probe runs of a study.

    Args:
        parser: Parser of the study.
        values: What it has read.
        data: Folder of images and masks, or the name of a layout, whose folder is among the values.
        models: The models by label, of which the first stands for all.

    Raises:
        SystemExit: The folder of a layout is missing.
        UserError: An option of the solver is out of range.
    """
    from probes.data.registry import DATASETS  # torch

    model = {"mllm": next(iter(models.values()))}
    where = {"root": data}
    if data in DATASETS:
        if values.data.root is None:
            parser.error("the following arguments are required: --data.root")
        where = {"dataset": data, "name": values.data.name or data}
    return parser.run_config(
        values,
        model=model,
        data=where,
        ckpt_path="last",
    )


def study_config(
    models: Mapping[str, str],
    data: str,
    *,
    configs: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> StudyConfig:
    """Return a study of models on a folder of images and masks, or on a layout.

    Args:
        models: Checkpoint directory or hub id by label.
        data: The folder, or the name of a layout, whose folder the options give.
        configs: Names or paths of YAML files for the probe runs.
        options: Options of the probe runs, nested as in YAML: {"data": {"batch_size": 2}}.
        **settings: Fields of :class:`StudyOptions`.

    Raises:
        UserError: An option is unknown or invalid.
    """
    parser = build_parser()
    values = parser.read([word for name in configs for word in ("-c", name)])
    values = parser.merge(values, options or {})
    probes = probe_config(parser, values, data, models)
    return options_from(StudyConfig, settings | {"models": dict(models), "probes": probes}, "study")
