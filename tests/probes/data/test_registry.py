"""Registration of layouts."""

import pytest
import tiny_models

from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.data.folder import FolderDataset
from probes.data.registry import DATASETS, LAYOUTS, open_dataset, register_dataset


@pytest.fixture
def layouts(monkeypatch) -> None:
    monkeypatch.setitem(LAYOUTS, "segmentation", dict(DATASETS))
    monkeypatch.setitem(LAYOUTS, "normals", dict(LAYOUTS["normals"]))


def test_registered_dataset_is_opened_and_checked_as_the_others(layouts):
    class Tiles(FolderDataset):
        def __init__(self, root, split, tiles: "int" = 1):
            pass

    class OtherNormals(LAYOUTS["normals"]["folder"]):
        pass

    register_dataset("tiles", Tiles)
    register_dataset("other", OtherNormals)
    assert LAYOUTS["normals"]["other"] is OtherNormals and "other" not in LAYOUTS["segmentation"]
    assert isinstance(
        open_dataset(
            "tiles",
            "",
            "training",
            {"tiles": 3},
        ),
        Tiles,
    )
    with pytest.raises(UserError, match="(?s)data.dataset 'tiles': .*int"):
        open_dataset(
            "tiles",
            "",
            "training",
            {"tiles": "x"},
        )
    with pytest.raises(UserError, match="the dataset name 'tiles' is taken by Tiles"):
        register_dataset("tiles", Tiles)


def test_a_command_takes_a_registered_dataset(layouts, tmp_path, capsys):
    class Mine(FolderDataset):
        pass

    register_dataset("mine", Mine)
    root = tiny_models.write_segmentation(tmp_path / "photos", 2, 2)
    main(["verify-data", "--data.dataset", "mine", "--data.root", str(root)])
    assert "2 training" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no data.dataset 'other' of segmentation; expected one"):
        main(["verify-data", "--data.dataset", "other", "--data.root", str(root)])
