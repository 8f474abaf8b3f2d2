"""Registry of dataset layouts. The options of a layout are the arguments of its class after `root` and `split`."""

import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import describe_digest
from llava_bidir.common.imports import HINT
from probes.config import DataOptions
from probes.tasks import TASKS

from .ade20k import ADE20K
from .base import ImageDataset, SegmentationDataset
from .boundaries import ClassBoundaries
from .cityscapes import Cityscapes, CityscapesDepth
from .folder import FolderDataset
from .folder_targets import FolderBoundaries, FolderDepth, FolderNormals
from .nyuv2 import NYUv2Depth
from .voc2012 import VOC2012

DATASETS: dict[str, type[SegmentationDataset]] = {
    "folder": FolderDataset,
    "ade20k": ADE20K,
    "voc2012": VOC2012,
    "cityscapes": Cityscapes,
}
TARGET_DATASETS: dict[str, dict[str, type[ImageDataset]]] = {  # of the other tasks
    "depth": {
        "folder": FolderDepth,
        "nyuv2": NYUv2Depth,
        "cityscapes": CityscapesDepth,
    },
    "normals": {"folder": FolderNormals},
    "boundaries": {"folder": FolderBoundaries},  # other layouts: the boundaries of the class map
}


def register_dataset(name: str, cls: type[ImageDataset]) -> None:
    """Add a layout under a new name for `data.dataset`; commands get it by `--import FILE.py`.

    Args:
        name: Name of the layout.
        cls: Subclass of SegmentationDataset, DepthDataset, NormalsDataset or InstanceBoundaries; each argument after
            `root` and `split` is an option and needs a type.

    Raises:
        UserError: If the name is taken.
    """
    layouts = _layouts(cls.task)
    if name in layouts:
        raise UserError(
            f"the dataset name {name!r} is taken by {layouts[name].__name__}; choose another name"
        )
    layouts[name] = cls


def open_split(data: DataOptions, split: str) -> ImageDataset:
    """Return a split of the data of a run, "training" or "validation".

    Raises:
        UserError: If the task, the layout or an option is unknown, or the files do not match the layout.
    """
    if data.task not in TASKS:
        raise UserError(f"data.task is {data.task!r}; expected one of {', '.join(TASKS)}")
    return open_dataset(
        data.dataset,
        data.root,
        split,
        data.options,
        TASKS[data.task].targets,
    )


def open_dataset(
    dataset: str,
    root: str,
    split: str,
    options: dict[str, Any] | None = None,
    task: str = "segmentation",
) -> ImageDataset:
    """Return a split of a dataset in a registered layout.

    Args:
        dataset: Name of the layout.
        root: Folder of the dataset, or what else the layout takes.
        split: "training" or "validation".
        options: Options of the layout.
        task: Kind of targets: "segmentation" or one of `TARGET_DATASETS`.

    Raises:
        UserError: If the layout or an option is unknown, or the files do not match the layout.
    """
    if task == "boundaries" and dataset in DATASETS and not _has_instances(dataset, root):
        return ClassBoundaries(open_dataset(dataset, root, split, options))
    layouts = _layouts(task)
    if dataset not in layouts:
        if any(dataset in of_task for of_task in (DATASETS, *TARGET_DATASETS.values())):
            problem = f"data.dataset {dataset!r} has no {task}"
        else:
            problem = f"unknown data.dataset {dataset!r}"
        known = {**layouts, **(DATASETS if task == "boundaries" else {})}
        raise UserError(f"{problem}; expected one of {', '.join(known)}; {HINT}")
    layout = layouts[dataset]
    _check_options(layout, dataset, options or {})
    return layout(root, split, **(options or {}))


def _layouts(task: str) -> dict[str, type[ImageDataset]]:
    return DATASETS if task == "segmentation" else TARGET_DATASETS[task]


def _has_instances(dataset: str, root: str) -> bool:
    """Return whether boundaries are those of instances; a folder dataset may have them."""
    return dataset in TARGET_DATASETS["boundaries"] and (
        dataset != "folder" or (Path(root) / "instances").is_dir()
    )


def split_identity(split: str, dataset: ImageDataset) -> dict[str, str]:
    """Return what a split is, see `common/identity.py`: its classes, images and targets by content."""
    parts = {f"{split}_{part}": value for part, value in dataset.identity().items()}
    return {"classes": describe_digest(dataset.classes, len(dataset.classes)), **parts}


def _option_types(layout: type) -> dict[str, Any]:
    """Return the type of each option, from the signature of the layout."""
    parameters = inspect.signature(layout, eval_str=True).parameters  # annotations may be postponed
    return {k: p.annotation for k, p in parameters.items() if k not in ("root", "split")}


def _check_options(layout: type, dataset: str, options: dict[str, Any]) -> None:
    """Raise unless the options match the signature, where a type is a class or a Literal of strings."""
    types = _option_types(layout) if options else {}
    for name, value in options.items():
        if name not in types:
            expected = ", ".join(types) or "none"
            raise UserError(
                f"data.dataset {dataset!r} has no option {name!r}; expected {expected} (data.options)"
            )
        choices = get_args(types[name]) if get_origin(types[name]) is Literal else None
        if choices and value not in choices:
            raise UserError(
                f"data.options.{name} is {value!r}; expected one of {', '.join(choices)}"
            )
        if not choices and not isinstance(value, types[name]):
            raise UserError(f"data.options.{name} is {value!r}; expected a {types[name].__name__}")
