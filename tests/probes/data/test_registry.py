"""Registration of layouts."""

import pytest

from llava_bidir.common.errors import UserError
from probes.config import DataOptions
from probes.data.folder import FolderDataset
from probes.data.registry import LAYOUTS, open_dataset, register_dataset
from probes.tasks import TASKS


def test_registered_dataset_is_opened_and_checked_as_the_others(monkeypatch):
    for task in ("segmentation", "normals"):
        monkeypatch.setitem(LAYOUTS, task, dict(LAYOUTS[task]))

    class Tiles(FolderDataset):
        def __init__(self, root, split, tiles: "int" = 1):
            pass

    class OtherNormals(LAYOUTS["normals"]["folder"]):
        pass

    register_dataset("tiles", Tiles)
    register_dataset("other", OtherNormals)
    assert LAYOUTS["normals"]["other"] is OtherNormals and "other" not in LAYOUTS["segmentation"]
    assert isinstance(open_dataset("tiles", root="", split="training", options={"tiles": 3}), Tiles)
    with pytest.raises(UserError, match="(?s)data.dataset 'tiles': .*int"):
        open_dataset("tiles", root="", split="training", options={"tiles": "x"})
    with pytest.raises(UserError, match="no data.dataset 'others' of segmentation; expected one"):
        open_dataset("others", "", "training")
    with pytest.raises(UserError, match="the dataset name 'tiles' is taken by Tiles"):
        register_dataset("tiles", Tiles)


def test_the_option_of_the_task_promises_the_tasks_that_exist():
    *others, last = TASKS
    (line,) = (x.strip() for x in DataOptions.__doc__.splitlines() if x.strip().startswith("task:"))
    assert line.endswith(f": {', '.join(others)} or {last}.")
