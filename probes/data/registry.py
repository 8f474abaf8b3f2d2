"""Registry of dataset layouts. The options of a layout are the arguments of its class after `root` and `split`."""

import inspect
from typing import Any, Literal, get_args, get_origin

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import describe

from .ade20k import ADE20K
from .ade20k_hf import ADE20KOnHub
from .base import SegmentationDataset
from .cityscapes import Cityscapes
from .folder import FolderDataset
from .voc2012 import VOC2012

DATASETS: dict[str, type[SegmentationDataset]] = {
    "folder": FolderDataset,
    "ade20k": ADE20K,
    "ade20k_hf": ADE20KOnHub,
    "voc2012": VOC2012,
    "cityscapes": Cityscapes,
}


def register_dataset(name: str, cls: type[SegmentationDataset]) -> None:
    """Add a layout under a new name for `data.dataset`, from Python before a command runs.

    Args:
        name: Name of the layout.
        cls: Subclass of SegmentationDataset; each argument after `root` and `split` is an option and needs a type.

    Raises:
        UserError: If the name is taken, the class is not a SegmentationDataset, or an option has no type.
    """
    if name in DATASETS:
        raise UserError(f"the dataset name {name!r} is taken by {DATASETS[name].__name__}; choose another name")
    if not (isinstance(cls, type) and issubclass(cls, SegmentationDataset)):
        raise UserError(f"dataset {name!r}: {cls!r} is not a subclass of SegmentationDataset")
    _option_types(cls)
    DATASETS[name] = cls


def open_dataset(dataset: str, root: str, split: str, options: dict[str, Any] | None = None) -> SegmentationDataset:
    """Return a split ("training", "validation") of a dataset in a registered layout.

    Raises:
        UserError: If the layout or an option is unknown, or the files do not match the layout.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data.dataset {dataset!r}; expected one of {', '.join(DATASETS)}")
    layout = DATASETS[dataset]
    _check_options(layout, dataset, options or {})
    return layout(root, split, **(options or {}))


def split_identity(split: str, dataset: SegmentationDataset) -> dict[str, str]:
    """Return what a split is, see `common/identity.py`: its classes, images and masks by content."""
    parts = {f"{split}_{part}": value for part, value in dataset.identity().items()}
    return {"classes": describe(dataset.classes, len(dataset.classes)), **parts}


def _option_types(layout: type) -> dict[str, Any]:
    """Return the type of each option, from the signature of the layout."""
    types = {k: p.annotation for k, p in inspect.signature(layout).parameters.items() if k not in ("root", "split")}
    for name, kind in types.items():
        if kind is inspect.Parameter.empty:
            raise UserError(f"option {name!r} of {layout.__name__} has no type in its signature; annotate it")
    return types


def _check_options(layout: type, dataset: str, options: dict[str, Any]) -> None:
    """Raise unless the options match the signature, where a type is a class or a Literal of strings."""
    types = _option_types(layout) if options else {}
    for name, value in options.items():
        if name not in types:
            expected = ", ".join(types) or "none"
            raise UserError(f"data.dataset {dataset!r} has no option {name!r}; expected {expected} (data.options)")
        choices = get_args(types[name]) if get_origin(types[name]) is Literal else None
        if choices and value not in choices:
            raise UserError(f"data.options.{name} is {value!r}; expected one of {', '.join(choices)}")
        if not choices and not isinstance(value, types[name]):
            raise UserError(f"data.options.{name} is {value!r}; expected a {types[name].__name__}")
