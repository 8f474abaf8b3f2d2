"""What somebody who adds a layout is told of its mistakes."""

import pytest

from probes.data.base import SegmentationDataset, lookup
from probes.data.registry import DATASETS, open_dataset


class Untold(SegmentationDataset):
    """A layout that is not finished: its option has no type, and its parts do not fit each other."""

    def __init__(self, root, split, tiles=1, **parts):
        fitting = {"files": {"a": ()}, "classes": ["x", "y"], "lookup": lookup(2)}
        super().__init__(**fitting | parts)


def test_a_layout_whose_parts_do_not_fit_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="Untold: the lookup leads to class 2, but 2 are named, from 0 on"):
        Untold("", "training", lookup=lookup(3))
    with pytest.raises(ValueError, match="Untold: 3 colours in the palette for 2 classes"):
        Untold("", "training", palette=[[0, 0, 0]] * 3)
    with pytest.raises(ValueError, match="Untold: 2 groups for 1 images"):
        Untold("", "training", groups=["a", "b"])
    monkeypatch.setitem(DATASETS, "untold", Untold)
    with pytest.raises(ValueError, match="option 'tiles' of Untold has no type in its signature"):
        open_dataset("untold", "", "training", {"tiles": 3})
