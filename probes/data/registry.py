"""Registry of dataset layouts. The options of a layout are the arguments of its class after `root` and `split`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import code_of_user, describe_digest
from llava_bidir.common.imports import HINT, check_takes, is_ours
from llava_bidir.common.processes import rank_zero_warn
from probes.config import DataOptions
from probes.tasks import SEGMENTATION, Task, find_task

from .ade20k import ADE20K
from .cityscapes import Cityscapes, CityscapesDepth
from .file_layout import WHOLE
from .folder import FolderBoundaries, FolderDataset, FolderDepth, FolderNormals
from .image_dataset import ImageDataset, SegmentationDataset
from .nyuv2 import NYUv2Depth
from .split import keep_split, note_of_series
from .targets import ClassBoundaries, TaskTargets
from .voc2012 import VOC2012

DATASETS: dict[str, type[SegmentationDataset]] = {
    "folder": FolderDataset,
    "ade20k": ADE20K,
    "voc2012": VOC2012,
    "cityscapes": Cityscapes,
}
LAYOUTS: dict[str, dict[str, type[ImageDataset]]] = {  # by kind of targets
    "segmentation": DATASETS,
    "depth": {"folder": FolderDepth, "nyuv2": NYUv2Depth, "cityscapes": CityscapesDepth},
    "normals": {"folder": FolderNormals},
    "boundaries": {"folder": FolderBoundaries},  # other layouts: the boundaries of the class map
}

DIVISION = "division"  # an option beside those of a layout


def register_dataset(name: str, cls: type[ImageDataset]) -> None:
    """Add a layout under a new name for `data.dataset`; commands get it by `--import FILE.py`.

    Args:
        name: Name of the layout.
        cls: Subclass of SegmentationDataset, DepthDataset, NormalsDataset or InstanceBoundaries; each argument after
            `root` and `split` is an option and needs a type.

    Raises:
        UserError: If the name is taken, or the class is none of these or takes other arguments.
    """
    if not (isinstance(cls, type) and issubclass(cls, ImageDataset) and hasattr(cls, "task")):
        raise UserError(
            f"dataset {name!r}: expected a subclass of probes.SegmentationDataset, got {cls!r}"
        )
    check_takes(cls, "root", "split")
    layouts = LAYOUTS.setdefault(cls.task, {})
    if name in layouts:
        raise UserError(
            f"the dataset name {name!r} is taken by {layouts[name].__name__}; choose another name"
        )
    layouts[name] = cls


def open_splits(data: DataOptions, seed: int = 0) -> dict[str, ImageDataset]:
    """Return the training and the validation split of the data of a run, with its seed.

    Raises:
        UserError: If the task, the layout or an option is unknown, or the files do not match the layout.
    """
    task = find_task(data.task)
    options = options_of_layout(data, seed)
    splits = {
        split: open_split(task, data.dataset, root=data.root, split=split, options=options)
        for split in ("training", "validation")
    }
    names = [*splits["training"].names, *splits["validation"].names]
    if data.validation is not None and data.groups is None and (note := note_of_series(names)):
        rank_zero_warn(note)
    return splits


def options_of_layout(data: DataOptions, seed: int) -> dict[str, Any]:
    """Return the options that a split is opened with: those of the layout, and how photos without splits are divided.

    Raises:
        UserError: Groups are given without a share.
    """
    options = data.options or {}
    if data.validation is None and data.groups is not None:
        raise UserError(
            "--groups keeps photos together when a share of them becomes validation; add --validation 0.3"
        )
    if data.validation is None:
        return options
    division = {"validation": data.validation, "groups": data.groups, "seed": seed}
    return options | {DIVISION: division}


def open_split(
    task: Task, dataset: str, root: str, split: str, options: dict[str, Any] | None
) -> ImageDataset:
    """Return a split with the targets of a task; arguments and errors are those of :func:`open_dataset`."""
    images = open_dataset(dataset, root=root, split=split, options=options, task=task.targets)
    return images if is_ours(type(task)) else TaskTargets(images, task)


def open_dataset(
    dataset: str,
    root: str,
    split: str,
    options: dict[str, Any] | None = None,
    task: str = SEGMENTATION,
) -> ImageDataset:
    """Return a split of a dataset in a registered layout.

    Args:
        dataset: Name of the layout.
        root: Folder of the dataset, or what else the layout takes.
        split: "training" or "validation".
        options: Options of the layout; with "division", how photos without splits are divided
            (:func:`options_of_layout`).
        task: Kind of targets, one of `LAYOUTS`.

    Raises:
        UserError: If the layout or an option is unknown, or the files do not match the layout.
    """
    layouts = LAYOUTS.get(task, {})
    options = dict(options or {})
    division = options.pop(DIVISION, None)
    if division is not None:
        if dataset != "folder":
            raise UserError(
                f"--validation: the layout {dataset} has splits of its own; leave it out"
            )
        whole = open_dataset(dataset, root=root, split=WHOLE, options=options, task=task)
        return keep_split(whole, split, **division)
    has_instances = dataset != "folder" or (Path(root) / "instances").is_dir()
    if task == "boundaries" and not (dataset in layouts and has_instances):
        return ClassBoundaries(open_dataset(dataset, root=root, split=split, options=options))
    if dataset not in layouts:
        raise UserError(
            f"there is no data.dataset {dataset!r} of {task}; expected one of {', '.join(layouts)}; {HINT}"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(layouts[dataset], skip={"root", "split"})
    try:
        parsed = parser.parse_object(options)
    except ArgumentError as error:
        raise UserError(f"data.options of data.dataset {dataset!r}: {error}") from None
    return layouts[dataset](root, split, **{name: parsed[name] for name in options})


def identity_of_splits(splits: Mapping[str, ImageDataset]) -> dict[str, str]:
    """Return what splits are, see `common/identity.py`: their classes, images and targets by content."""
    identity = {}
    for split, dataset in splits.items():
        identity["classes"] = describe_digest(dataset.classes, len(dataset.classes))
        identity |= code_of_user(dataset)
        for part, value in dataset.identity().items():
            identity[f"{split}_{part}"] = value
    return identity
