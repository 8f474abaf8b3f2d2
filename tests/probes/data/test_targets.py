"""Depth, normals and boundaries in all layouts: values against independent readers, and errors that name the file."""

import json
import shutil

import dataset_layouts
import numpy as np
import pytest
import torch
from PIL import Image

from llava_bidir.common.errors import UserError
from probes.config import DataOptions
from probes.data.batches import PreprocessedDataset, collate
from probes.data.probe_data import ProbeData
from probes.data.registry import LAYOUTS, identity_of_splits, open_dataset
from probes.data.samplers import PAD_INDEX
from probes.data.targets import find_boundaries

SIZE = (6, 9)
DEPTH, NORMALS, IDS = (f"{kind}/validation/0.png" for kind in ("depth", "normals", "instances"))


@pytest.fixture
def root(tmp_path):
    return dataset_layouts.write_folder_targets(tmp_path / "data")


def opened(root, task, split="validation", dataset="folder"):
    return open_dataset(dataset, root, split, task=task)


def raw(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.float64)


@pytest.mark.parametrize("limit", [None, 5.0])
def test_depth_is_value_times_scale_and_nan_for_zero_or_beyond_the_limit(root, limit):
    settings = {"depth_scale": 0.001} | ({"max_depth": limit} if limit else {})
    (root / "targets.json").write_text(json.dumps(settings))
    data = opened(root, "depth")
    stored = raw(root / DEPTH)
    assert (data.task, data.classes, len(data)) == ("depth", [], 1)
    target = data[0]["target"]
    has_value = (stored > 0) & (stored <= 1000 * (limit or np.inf))
    np.testing.assert_allclose(target, np.where(has_value, stored / 1000, np.nan), rtol=1e-6)
    assert np.isnan(target).sum() == 1 if limit is None else np.isnan(target).mean() > 0.2


def test_normals_are_unit_vectors_and_nan_where_black(root):
    target = opened(root, "normals")[0]["target"]
    stored = raw(root / NORMALS)
    vectors = 2 * stored / 255 - 1
    vectors /= np.sqrt((vectors**2).sum(-1, keepdims=True))
    vectors[0, 0] = np.nan
    np.testing.assert_allclose(target, vectors, atol=1e-6)


def test_truncated_normals_are_accepted(root):
    vectors = np.random.default_rng(0).standard_normal((*SIZE, 3))
    vectors[..., 2] = abs(vectors[..., 2])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    Image.fromarray(((vectors + 1) * 127.5).astype(np.uint8)).save(root / NORMALS)
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


def test_boundaries_equal_those_of_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = (rng.random((7, 8)) < 0.3).cumsum(1).astype(np.uint16) * 200  # beyond 255
        for ignored in (rng.random((7, 8)) < 0.1, np.zeros((7, 8), bool)):
            expected = loop_boundaries(ids, ignored)
            np.testing.assert_array_equal(find_boundaries(ids, ignored), expected)
        np.testing.assert_array_equal(find_boundaries(ids), expected)
    example = np.array([[1, 1, 2], [1, 1, 2], [3, 3, 3]], np.uint8)
    assert find_boundaries(example).tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_boundaries_are_of_instances_or_else_of_classes(root):
    for file, ignored in ((IDS, -1), ("annotations/validation/0.png", 255)):
        data = opened(root, "boundaries")
        ids = raw(root / file)
        assert (data.task, data.classes) == ("boundaries", ["interior", "boundary"])
        np.testing.assert_array_equal(data[0]["target"], loop_boundaries(ids, ids == ignored))
        shutil.rmtree(root / "instances", ignore_errors=True)
    assert 255 in data[0]["target"]


def test_any_segmentation_layout_has_boundaries(tmp_path):
    dataset_layouts.write_cityscapes(tmp_path)
    data, masks = (
        opened(tmp_path, task=task, split="training", dataset="cityscapes")
        for task in ("boundaries", "segmentation")
    )
    assert data.groups == masks.groups
    assert data.official_size == 2975
    assert data.identity() == masks.identity()
    labels = masks[1]["target"]
    np.testing.assert_array_equal(data[1]["target"], loop_boundaries(labels, labels == 255))


def test_cityscapes_depth_is_baseline_times_focal_length_over_disparity(tmp_path):
    city = dataset_layouts.write_cityscapes_depth(dataset_layouts.write_cityscapes(tmp_path))
    data = opened(city, task="depth", split="training", dataset="cityscapes")
    assert data.groups == ["aachen", "aachen", "ulm"]
    assert data.official_size == 2975
    for sample in data:
        values = raw(next(city.glob(f"disparity/train/*/{sample['name']}_disparity.png")))
        camera = json.loads(next(city.glob(f"camera/train/*/{sample['name']}_*")).read_text())
        focal = camera["extrinsic"]["baseline"] * camera["intrinsic"]["fx"]
        depth = focal / ((np.where(values > 1, values, np.nan) - 1) / 256)
        depth[depth > 80] = np.nan
        np.testing.assert_allclose(sample["target"], depth, rtol=1e-5)
    assert np.isnan(depth).sum() >= 2
    assert np.isfinite(depth).any()


def test_nyuv2_is_the_official_split_with_depth_up_to_10_m_scored_in_eigens_crop(tmp_path):
    root = dataset_layouts.write_nyuv2(tmp_path / "official_splits", size=(480, 640))
    training, data = (
        opened(tmp_path, task="depth", split=split, dataset="nyuv2")
        for split in ("training", "validation")
    )
    assert (training.official_size, data.official_size) == (795, 654)
    assert training.names == ["00002", "00005", "00006"]
    assert data.names == ["00000", "00001"]
    inside = np.zeros((480, 640), bool)
    inside[45:471, 41:601] = True  # as dataset_loader of DINOv2's depth toolbox, eigen_crop
    for name, counts, sample in (
        ("train/cafe/sync_depth_00002.png", np.ones_like(inside), training[0]),
        ("test/kitchen/sync_depth_00001.png", inside, data[1]),
    ):
        stored = raw(root / name)
        has_value = (stored > 0) & (stored <= 10_000) & counts
        expected = np.where(has_value, stored / 1000, np.nan)
        np.testing.assert_allclose(sample["target"], expected, rtol=1e-6)


def test_nyuv2_of_another_size_has_no_crop_to_be_scored_in(tmp_path):
    dataset_layouts.write_nyuv2(tmp_path / "official_splits")
    data = opened(tmp_path, "depth", dataset="nyuv2")
    with pytest.raises(UserError, match="sync_depth_00000.png is 9 x 6 px; expected 640 x 480 px"):
        data[0]


@pytest.mark.parametrize("task", ["depth", "normals", "boundaries"])
def test_batches_keep_targets_and_pad_with_no_value(task, root):
    data = opened(root, task, "training")
    images = PreprocessedDataset(data, lambda images: torch.zeros((len(images), 3, 4, 4)))
    target, padding = collate([images[0], images[PAD_INDEX]])["target"]
    assert target.dtype == (torch.uint8 if task == "boundaries" else torch.float32)
    np.testing.assert_array_equal(target, data[0]["target"])
    assert (padding == 255).all() if task == "boundaries" else padding.isnan().all()


def identities(root):
    return {task: identity_of_splits({"validation": opened(root, task)}) for task in LAYOUTS}


def test_identity_changes_with_the_targets_and_how_they_are_read(root):
    before = identities(root)
    assert len({json.dumps(identity) for identity in before.values()}) == len(LAYOUTS)
    for kind in ("depth", "normals", "instances"):
        path = root / kind / "validation/0.png"
        array = np.asarray(Image.open(path)).copy()
        array[3, 3] = array[4, 4]
        Image.fromarray(array).save(path)
    after = identities(root)
    assert {task for task in LAYOUTS if after[task] != before[task]} == {
        "depth",
        "normals",
        "boundaries",
    }
    (root / "targets.json").write_text('{"depth_scale": 0.002}')
    assert identities(root)["depth"] != after["depth"]


GREY = dataset_layouts.unit_normals(0)
GREY[2, 3] = 128
AWAY = 255 - dataset_layouts.unit_normals(0)[1:].repeat(2, 0)[:6]
BAD_FILES = {  # message: task, file, its array
    "0.png has mode 'L'; expected 16-bit": ("depth", DEPTH, np.ones(SIZE, np.uint8)),
    r"depth/\S*0.png is 6 x 9 px, its image \S*0.png 9 x 6 px": (
        "depth",
        DEPTH,
        np.ones((9, 6), np.uint16),
    ),
    r"\[128, 128, 128\] in row 2.* length 0.007, exp": ("normals", NORMALS, GREY),
    "most normals point away from": ("normals", NORMALS, AWAY),
    "mode 'RGB'; expected .*ids": ("boundaries", IDS, dataset_layouts.photo(0)),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_file_is_an_error_that_names_it(root, message):
    task, file, array = BAD_FILES[message]
    dataset_layouts.save(root / file, array)
    with pytest.raises(UserError, match=message):
        opened(root, task)[0]


def test_depth_in_another_unit_is_an_error(root):
    (root / "targets.json").write_text('{"depth_scale": 100, "max_depth": 10}')
    with pytest.raises(UserError, match=r"no other labels than \[\].*scale of values"):
        ProbeData(DataOptions(str(root), task="depth", num_workers=0)).verify(False)


def test_settings_of_depth_are_positive_numbers(root):
    (root / "targets.json").unlink()
    with pytest.raises(
        UserError, match=r'targets.json needs to be there, as {"depth_scale": 0.001'
    ):
        opened(root, "depth")
    (root / "targets.json").write_text('{"depth_scale": 1, "maxdepth": 1}')
    with pytest.raises(UserError, match="targets.json has the key 'maxdepth'.* mean 'max_depth'"):
        opened(root, "depth")
    for settings in ('{"depth_scale": 0}', "{}"):
        (root / "targets.json").write_text(settings)
        with pytest.raises(UserError, match='targets.json .*; expected .*"depth_scale": 0.001'):
            opened(root, "depth")
