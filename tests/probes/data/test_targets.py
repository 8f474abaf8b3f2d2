"""Depth, normals and boundaries in all layouts: values against independent readers, and errors that name the file."""

import json
import shutil
from pathlib import Path

import dataset_layouts
import numpy as np
import pytest
import torch
from PIL import Image

from llava_bidir.common.errors import UserError
from probes.data.base import BadFile
from probes.data.batches import PreprocessedDataset, collate
from probes.data.boundaries import find_boundaries
from probes.data.probe_data import ProbeData
from probes.data.registry import (
    DATASETS,
    TARGET_DATASETS,
    open_dataset,
    register_dataset,
    split_identity,
)
from probes.data.samplers import PAD_INDEX

TARGETS = ("segmentation", *TARGET_DATASETS)
SIZE = (6, 9)


@pytest.fixture
def root(tmp_path):
    return dataset_layouts.write_folder_targets(tmp_path / "data")


def opened(
    root,
    task,
    split="validation",
    **kwargs,
):
    return open_dataset(
        "folder",
        str(root),
        split,
        task=task,
        **kwargs,
    )


def raw(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.float64)


def test_depth_is_value_times_scale_and_nan_for_zero(root):
    data = opened(root, "depth")
    sample = data[0]
    stored = raw(root / "depth/validation/0.png")
    assert data.task == "depth"
    assert data.classes == []
    assert len(data) == 1
    assert sample["target"].dtype == np.float32
    assert sample["target"].shape == SIZE
    expected = [
        [np.nan if value == 0 else value / 1000 for value in row] for row in stored.tolist()
    ]
    np.testing.assert_allclose(sample["target"], expected, rtol=1e-6)
    assert np.isnan(sample["target"]).sum() == 1


def test_depth_beyond_the_limit_is_no_value(root):
    (root / "targets.json").write_text('{"depth_scale": 0.001, "max_depth": 5}')
    target = opened(root, "depth")[0]["target"]
    stored = raw(root / "depth/validation/0.png")
    assert (np.isnan(target) == ((stored > 5000) | (stored == 0))).all()
    assert np.isnan(target).mean() > 0.2


def test_normals_are_unit_vectors_and_nan_where_black(root):
    target = opened(root, "normals")[0]["target"]
    stored = raw(root / "normals/validation/0.png")
    assert target.dtype == np.float32
    assert target.shape == (*SIZE, 3)
    vectors = 2 * stored / 255 - 1
    vectors /= np.sqrt((vectors**2).sum(-1, keepdims=True))
    vectors[0, 0] = np.nan
    np.testing.assert_allclose(target, vectors, atol=1e-6)


def test_truncated_normals_are_accepted(root):
    vectors = np.random.default_rng(0).standard_normal((*SIZE, 3))
    vectors[..., 2] = abs(vectors[..., 2])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    Image.fromarray(((vectors + 1) * 127.5).astype(np.uint8)).save(
        root / "normals/validation/0.png"
    )
    cosines = (opened(root, "normals")[0]["target"] * vectors).sum(-1)
    assert cosines.min() > np.cos(np.radians(1.0))


def loop_boundaries(ids: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """seg2bmap.m pixel by pixel, with its own rules for the last row and column."""
    height, width = ids.shape
    result = np.zeros(ids.shape, np.uint8)
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            neighbours = [(v, u) for v, u in neighbours if v < height and u < width]
            result[y, x] = any(ids[y, x] != ids[place] for place in neighbours)
            if ignored[y, x] or any(ignored[place] for place in neighbours):
                result[y, x] = 255
    return result


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_boundaries_equal_those_of_a_loop(dtype):
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = (rng.random((7, 8)) < 0.3).cumsum(1).astype(dtype) * 200  # beyond 255 in 16 bits
        ignored = rng.random((7, 8)) < 0.1
        np.testing.assert_array_equal(find_boundaries(ids, ignored), loop_boundaries(ids, ignored))
        np.testing.assert_array_equal(
            find_boundaries(ids), loop_boundaries(ids, np.zeros((7, 8), bool))
        )
    example = np.array([[1, 1, 2], [1, 1, 2], [3, 3, 3]], dtype)
    assert find_boundaries(example).tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_boundaries_are_of_instances_or_else_of_classes(root):
    data = opened(root, "boundaries")
    ids = raw(root / "instances/validation/0.png")
    assert (data.task, data.classes) == ("boundaries", ["interior", "boundary"])
    assert data[0]["target"].dtype == np.uint8
    np.testing.assert_array_equal(data[0]["target"], loop_boundaries(ids, ids < 0))
    shutil.rmtree(root / "instances")
    data = opened(root, "boundaries")
    labels = raw(root / "annotations/validation/0.png")
    assert (data.task, data.classes) == ("boundaries", ["interior", "boundary"])
    np.testing.assert_array_equal(data[0]["target"], loop_boundaries(labels, labels == 255))
    assert set(np.unique(data[0]["target"])) <= {0, 1, 255}
    assert 255 in data[0]["target"]


def test_any_segmentation_layout_has_boundaries(tmp_path):
    city = str(dataset_layouts.write_cityscapes(tmp_path))
    data = open_dataset("cityscapes", city, "training", task="boundaries")
    masks = open_dataset("cityscapes", city, "training")
    assert data.groups == masks.groups
    assert data.names == masks.names
    assert data.official_size == 2975
    labels = masks[1]["target"]
    np.testing.assert_array_equal(data[1]["target"], loop_boundaries(labels, labels == 255))


def test_cityscapes_depth_is_baseline_times_focal_length_over_disparity(tmp_path):
    city = dataset_layouts.write_cityscapes_depth(dataset_layouts.write_cityscapes(tmp_path))
    data = open_dataset("cityscapes", str(city), "training", task="depth")
    assert data.groups == ["aachen", "aachen", "ulm"]
    assert data.official_size == 2975
    for sample in data:
        values = raw(next(city.glob(f"disparity/train/*/{sample['name']}_disparity.png")))
        camera = json.loads(
            next(city.glob(f"camera/train/*/{sample['name']}_camera.json")).read_text()
        )
        focal = camera["extrinsic"]["baseline"] * camera["intrinsic"]["fx"]
        for value, depth in zip(values.ravel(), sample["target"].ravel(), strict=True):
            expected = focal / ((value - 1) / 256) if value > 1 else np.inf
            assert np.isnan(depth) if expected > 80 else depth == pytest.approx(expected, rel=1e-5)
    assert np.isnan(sample["target"]).sum() >= 2
    assert np.isfinite(sample["target"]).any()


def test_nyuv2_is_the_official_split_with_depth_up_to_10_m_scored_in_eigens_crop(tmp_path):
    root = dataset_layouts.write_nyuv2(tmp_path / "official_splits", size=(480, 640))
    training, data = (
        open_dataset("nyuv2", str(tmp_path), split, task="depth")
        for split in ("training", "validation")
    )
    assert (training.official_size, data.official_size) == (795, 654)
    assert training.names == ["00002", "00005", "00006"]
    assert data.names == ["00000", "00001"]
    inside = np.zeros((480, 640), bool)
    inside[45:471, 41:601] = True  # as dataset_loader of DINOv2's depth toolbox, eigen_crop
    files = ("train/cafe/sync_depth_00002.png", "test/kitchen/sync_depth_00001.png")
    scored = (np.ones_like(inside), inside)
    for name, counts, sample in zip(files, scored, (training[0], data[1]), strict=True):
        stored = raw(root / name)
        target = sample["target"]
        assert (np.isnan(target) == ((stored == 0) | (stored > 10_000) | ~counts)).all()
        np.testing.assert_allclose(
            target[~np.isnan(target)], stored[~np.isnan(target)] / 1000, rtol=1e-6
        )
    values = [split.identity()["depth_values"] for split in (training, data)]
    assert values[0] != values[1]


def test_nyuv2_of_another_size_has_no_crop_to_be_scored_in(tmp_path):
    dataset_layouts.write_nyuv2(tmp_path / "official_splits")
    data = open_dataset("nyuv2", str(tmp_path), "validation", task="depth")
    with pytest.raises(BadFile, match="sync_depth_00000.png is 9 x 6 px; expected 640 x 480 px"):
        data[0]


def test_batches_keep_targets_and_pad_with_no_value(root):
    def preprocess(images):
        return torch.zeros(len(images), 3, 4, 4)

    for task, shape, dtype in (
        ("depth", SIZE, torch.float32),
        ("normals", (*SIZE, 3), torch.float32),
        ("boundaries", SIZE, torch.uint8),
    ):
        data = opened(root, task, "training")
        images = PreprocessedDataset(data, preprocess)
        batch = collate([images[0], images[PAD_INDEX]])
        assert batch["target"].shape == (2, *shape)
        assert batch["target"].dtype == dtype
        np.testing.assert_array_equal(batch["target"][0], data[0]["target"])
        padding = batch["target"][1]
        assert padding.isnan().all() if dtype.is_floating_point else (padding == 255).all()


def test_identity_changes_with_the_targets_and_how_they_are_read(root):
    before = {task: split_identity("validation", opened(root, task)) for task in TARGETS}
    assert len({json.dumps(identity) for identity in before.values()}) == len(TARGETS)
    for kind in ("depth", "normals", "instances"):
        path = root / kind / "validation/0.png"
        array = np.asarray(Image.open(path)).copy()
        array[3, 3] = array[4, 4]
        Image.fromarray(array).save(path)
    changed = {
        task for task in TARGETS if split_identity("validation", opened(root, task)) != before[task]
    }
    assert changed == {"depth", "normals", "boundaries"}
    depth = split_identity("validation", opened(root, "depth"))
    (root / "targets.json").write_text('{"depth_scale": 0.002}')
    assert split_identity("validation", opened(root, "depth")) != depth


def test_layouts_that_do_not_exist_are_errors(root, monkeypatch):
    with pytest.raises(
        UserError,
        match="data.dataset 'voc2012' has no depth; expected one of folder, nyuv2, cityscapes",
    ):
        open_dataset("voc2012", str(root), "training", task="depth")
    with pytest.raises(
        UserError, match="data.dataset 'nyuv2' has no segmentation; expected one of folder, ade20k"
    ):
        ProbeData(str(root), dataset="nyuv2")
    monkeypatch.setitem(TARGET_DATASETS, "normals", dict(TARGET_DATASETS["normals"]))

    class OtherNormals(TARGET_DATASETS["normals"]["folder"]):
        pass

    register_dataset("other", OtherNormals)
    assert isinstance(open_dataset("other", str(root), "training", task="normals"), OtherNormals)
    assert "other" not in DATASETS


def save(path: Path, array, dtype=None) -> None:
    Image.fromarray(np.asarray(array, dtype)).save(path)


def saves(path: str, array, dtype=None):
    """Return what saves an image in a folder."""
    return lambda root: save(root / path, array, dtype)


def settings(text: str):
    """Return what writes targets.json of a folder."""
    return lambda root: (root / "targets.json").write_text(text)


def grey_normals(value: int) -> np.ndarray:
    array = dataset_layouts.unit_normals(0)
    array[2, 3] = value
    return array


DEPTH, NORMALS, IDS = (f"{kind}/validation/0.png" for kind in ("depth", "normals", "instances"))
BAD_FILES = {
    "8-bit depth": ("depth", saves(DEPTH, np.ones(SIZE), np.uint8), "0.png has mode 'L'.*uint16"),
    "depth in colour": (
        "depth",
        saves(DEPTH, dataset_layouts.photo(0)),
        "mode 'RGB'.*these are colours",
    ),
    "depth of zeros": (
        "depth",
        saves(DEPTH, np.zeros(SIZE), np.uint16),
        "0.png has no value in any pixel",
    ),
    "depth in another unit": (
        "depth",
        settings('{"depth_scale": 100, "max_depth": 10}'),
        "0.png has no value up to the limit of 10 m; check the scale",
    ),
    "depth of another size": (
        "depth",
        saves(DEPTH, np.ones((9, 6)), np.uint16),
        r"depth/\S*0.png is 6 x 9 px, its image \S*0.png 9 x 6 px",
    ),
    "JPEG depth": (
        "depth",
        lambda r: Image.new("L", SIZE[::-1]).save(r / DEPTH, "JPEG"),
        "0.png cannot be read as an image: it is not PNG",
    ),
    "grey normals": (
        "normals",
        saves(NORMALS, grey_normals(128)),
        r"\[128, 128, 128\] in row 2.* 0.007, exp",
    ),
    "normals not of unit length": (
        "normals",
        saves(NORMALS, grey_normals(255)),
        "vector of length 1.732",
    ),
    "black normals": ("normals", saves(NORMALS, np.zeros((*SIZE, 3)), np.uint8), "0.png is black"),
    "normals away from the viewer": (
        "normals",
        saves(NORMALS, 255 - dataset_layouts.unit_normals(0)[1:].repeat(2, 0)[:6]),
        "100% of the normals point away from the viewer",
    ),
    "instances in colour": (
        "boundaries",
        saves(IDS, dataset_layouts.photo(0)),
        "mode 'RGB'.*colours to ids",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_an_error_that_names_it(root, name):
    task, break_it, message = BAD_FILES[name]
    break_it(root)
    data = opened(root, task)
    with pytest.raises(BadFile, match=message) as error:
        data[0]
    assert str(root) in str(error.value)


BAD_LAYOUTS = {
    "no scale": (
        lambda r: (r / "targets.json").unlink(),
        r"targets.json has no depth_scale, .*\S*depth/validation/0.png",
    ),
    "scale 0": (settings('{"depth_scale": 0}'), "targets.json: depth_scale is 0; exp"),
    "limit 0": (settings('{"depth_scale": 1, "max_depth": 0}'), "max_depth is 0"),
    "unknown key": (settings('{"scale": 1}'), "unknown key 'scale'; expected depth_scale"),
    "settings that are a list": (settings("[1]"), "targets.json needs an object"),
    "missing file": (
        lambda r: (r / DEPTH).unlink(),
        "1 files have no depth map, e.g. .*images/validation/0.png",
    ),
    "extra file": (
        lambda r: shutil.copy(r / DEPTH, r / "depth/validation/9.png"),
        "no image, e.g. .*depth/val.*9.png",
    ),
    "no folder": (lambda r: shutil.rmtree(r / "depth"), "no folder .*depth/validation"),
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_bad_layout_is_an_error_before_any_work(root, name):
    break_it, message = BAD_LAYOUTS[name]
    break_it(root)
    with pytest.raises(UserError, match=message) as error:
        opened(root, "depth")
    assert str(root) in str(error.value)
