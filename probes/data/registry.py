"""The layouts that data can come in, by name. What a layout's class takes behind root and split are its options."""

import inspect
from typing import Any, Literal, get_args, get_origin

from llava_bidir.common.errors import UserError

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


def open_dataset(dataset: str, root: str, split: str, options: dict[str, Any] | None = None) -> SegmentationDataset:
    """A split ("training", "validation") of a dataset in a registered layout.

    Raises:
        UserError: The layout, or one of its options, is unknown, or the files are not laid out as it says.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data.dataset {dataset!r}; registered: {', '.join(DATASETS)}")
    layout = DATASETS[dataset]
    _check_options(layout, f"data.dataset {dataset!r}", options or {})
    return layout(root, split, **(options or {}))


def _check_options(layout: type, which: str, options: dict[str, Any]) -> None:
    """Options are those of the layout's signature, and of its types: a class, or one of several strings (Literal)."""
    known = {k: p.annotation for k, p in inspect.signature(layout).parameters.items() if k not in ("root", "split")}
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{which} has no option {name!r}; it has {', '.join(known) or 'none'} (data.options)")
        if known[name] is inspect.Parameter.empty:
            raise UserError(f"option {name!r} of {layout.__name__} has no type in its signature; give it one")
        choices = get_args(known[name]) if get_origin(known[name]) is Literal else None
        if choices and value not in choices:
            raise UserError(f"data.options.{name} is {value!r}; there is {', '.join(choices)}")
        if not choices and not isinstance(value, known[name]):
            raise UserError(f"data.options.{name} is {value!r}; expected a {known[name].__name__}")
