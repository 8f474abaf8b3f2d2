"""All files are read before a model is loaded."""

import dataset_layouts
import numpy as np
import pytest
import tiny_models
from PIL import Image

from probes.cli import main
from probes.data.probe_data import ProbeData
from probes.data.registry import open_dataset
from probes.data.verify import find_bad_files

MESS = {  # file of annotations/training: what it becomes
    "000.png": np.full((24, 20), 9, np.uint8),
    "001.png": np.full((24, 20), 77, np.uint8),
    "002.png": np.zeros((24, 20, 3), np.uint8),
    "003.png": np.zeros((24, 21), np.uint8),
}


@pytest.fixture
def broken(tmp_path):
    root = tiny_models.write_segmentation(tmp_path / "data")
    for name, array in MESS.items():
        Image.fromarray(array).save(root / "annotations/training" / name)
    (root / "images/validation/004.png").write_bytes(b"no picture")
    return root


def fit(root, out, *more):
    # the model does not exist: it must not be looked up
    config = ["-c", "configs/demo/probes.yaml", "--out", str(out), "--data.root", str(root)]
    main(["fit", *config, "--model.mllm", "/no/such/model", *more])


def test_all_bad_files_are_listed_by_kind_before_the_model_is_loaded(
    broken,
    checkpoints,
    tmp_path,
    monkeypatch,
):
    monkeypatch.delattr("probes.site_probes.load")
    with pytest.raises(SystemExit) as stop:
        fit(broken, tmp_path / "run", "--model.mllm", str(checkpoints["causal"]))
    message = str(stop.value.code)
    assert "5 of 11 images cannot be used" in message
    assert "2 x label out of range" in message
    assert "000.png has label 9" in message
    assert "label 77" in message
    assert "1 x mask that is not 8-bit indices" in message
    assert "002.png has mode 'RGB'" in message
    assert "1 x image and mask of different size" in message
    assert "003.png is 21 x 24 px" in message
    assert "1 x cannot be read" in message
    assert "images/validation/004.png" in message


def test_a_split_without_a_boundary_is_an_error(checkpoints, tmp_path):
    """As that of VOC, whose objects have an ignored border: F would be 0 / 0, and the run could not be read."""
    root = tiny_models.write_segmentation(tmp_path / "data")
    mask = np.zeros((24, 20), np.uint8)
    mask[8:], mask[7:9] = 1, 255
    for file in (root / "annotations/validation").iterdir():
        Image.fromarray(mask).save(file)
    with pytest.raises(
        SystemExit,
        match="(?s)5 x no labelled pixel in any mask of .* validation.*no pixel is a boundary",
    ):
        fit(
            root,
            tmp_path / "run",
            "--model.mllm",
            str(checkpoints["causal"]),
            "--data.task",
            "boundaries",
        )


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_split_without_a_labelled_pixel_is_an_error(split, checkpoints, tmp_path):
    """A wrong ignore_index: probes would be scored untrained, or the scores would fail after the training."""
    root = tiny_models.write_segmentation(tmp_path / "data")
    masks = sorted((root / "annotations" / split).iterdir())
    for number, file in enumerate(masks, 1):
        Image.fromarray(np.full((24, 20), 255, np.uint8)).save(file)
        if number + 1 == len(masks):
            assert not ProbeData(str(root)).check_files(ProbeData(str(root)).find_bad_files(0))
    with pytest.raises(
        SystemExit, match=f"{len(masks)} x no labelled pixel in any mask of .* {split}"
    ):
        fit(root, tmp_path / "run", "--model.mllm", str(checkpoints["causal"]))


def test_verify_data_finds_the_same_without_a_model(broken, segmentation, capsys):
    config = ["verify-data", "--workers", "0", "-c", "configs/demo/probes.yaml", "--data.root"]
    main([*config, str(segmentation)])
    assert (
        "6 training images, 5 validation images, 3 classes, all readable" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="5 of 11 images cannot be used"):
        main([*config, str(broken)])


def test_workers_find_what_one_process_finds(tmp_path):
    root = tiny_models.write_segmentation(tmp_path, training=80)
    for i in (3, 40, 79):
        Image.fromarray(np.full((24, 20), 100 + i, np.uint8)).save(
            root / f"annotations/training/{i:03d}.png"
        )
    dataset = open_dataset("folder", str(root), "training")
    alone, together = (
        find_bad_files(
            dataset,
            "",
            range(80),
            workers,
            progress=False,
        )
        for workers in (0, 2)
    )
    assert sorted(alone) == sorted(together)
    assert len(alone) == 3
    assert (
        len(
            find_bad_files(
                dataset,
                "",
                range(0, 80, 2),
                0,
                progress=False,
            )
        )
        == 1
    ), "a share"


def test_incomplete_official_split_is_a_warning(tmp_path):
    data = ProbeData(str(dataset_layouts.write_ade20k(tmp_path)), dataset="ade20k")
    with pytest.warns(UserWarning, match="3 training images, but 20,210 were published") as warned:
        assert data.find_bad_files(0, progress=False) == []
    assert any("2 validation images, but 2,000" in str(warning.message) for warning in warned)
