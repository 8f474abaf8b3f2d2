"""Registration of layouts, and of targets."""

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from probes.cli import main
from probes.data.batches import PreprocessedDataset
from probes.data.boundaries import InstanceBoundaries
from probes.data.folder import FolderDataset
from probes.data.registry import DATASETS, open_dataset, register_dataset
from probes.data.samplers import PAD_INDEX


def test_registered_dataset_is_opened_and_checked_as_the_others(monkeypatch):
    class Tiles(FolderDataset):
        def __init__(self, root, split, tiles: int = 1):
            pass

    monkeypatch.setattr("probes.data.registry.DATASETS", dict(DATASETS))
    register_dataset("tiles", Tiles)
    assert isinstance(open_dataset("tiles", "", "training", {"tiles": 3}), Tiles)
    with pytest.raises(ValueError, match="data.options.tiles is 'x'; expected a int"):
        open_dataset("tiles", "", "training", {"tiles": "x"})
    with pytest.raises(ValueError, match="the dataset name 'tiles' is taken by Tiles"):
        register_dataset("tiles", Tiles)


def test_boundaries_of_a_registered_dataset_may_be_truth_values(tmp_path):
    class Edges(InstanceBoundaries):
        def read_target(self, image, image_file, ids_file):
            return super().read_target(image, image_file, ids_file) == 1

    Image.new("RGB", (4, 3)).save(tmp_path / "photo.png")
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) // 4).save(tmp_path / "ids.png")
    files = {"photo": (tmp_path / "photo.png", tmp_path / "ids.png")}
    expected = InstanceBoundaries(files)[0]["target"]
    sample = PreprocessedDataset(Edges(files), lambda images: torch.zeros(1, 3, 4, 4))
    assert torch.equal(sample[0]["target"], torch.from_numpy(expected))
    assert (sample[PAD_INDEX]["target"] == 255).all()


def test_a_command_takes_a_registered_dataset(monkeypatch, tmp_path, capsys):
    class Mine(FolderDataset):
        def __init__(self, root, split):
            super().__init__(root, split)

    monkeypatch.setattr("probes.data.registry.DATASETS", dict(DATASETS))
    register_dataset("mine", Mine)
    root = tiny_models.write_segmentation(tmp_path / "photos", 2, 2)
    main(["verify-data", "--data.dataset", "mine", "--data.root", str(root)])
    assert "2 training" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown data.dataset 'other'; expected one of folder"):
        main(["verify-data", "--data.dataset", "other", "--data.root", str(root)])
