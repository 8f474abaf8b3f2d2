"""A folder of photos without splits: a share of them becomes validation, and nothing is moved."""

import shutil
import warnings
from pathlib import Path

import pytest
import tiny_models
from PIL import Image
from probe_runs import places

from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.config import DataOptions
from probes.data.registry import open_splits
from probes.runs.read import ProbeRun

CLIPS = ["a_0", "a_1", "b_0", "b_1", "b_2", "c_0", "d_0", "d_1", "e_0", "e_1"]
BY_CLIP = "^._"
PLACES = {  # folders of photos and of masks, and the kind of photo
    "side by side": (".", ".", "jpg"),
    "masks": ("images", "masks", "png"),
    "annotations": ("images", "annotations", "jpg"),
}


def write_plain(root: Path, kind: str) -> Path:
    """Write ten photos of five clips, without splits."""
    photos, masks, suffix = PLACES[kind]
    split = tiny_models.write_segmentation(root / "split", training=len(CLIPS))
    for folder in (photos, masks):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(CLIPS):
        file = f"training/{number:03d}.png"
        Image.open(split / "images" / file).save(root / photos / f"{name}.{suffix}")
        shutil.copy(split / "annotations" / file, root / masks / f"{name}.png")
    shutil.move(split / "classes.json", root)
    shutil.rmtree(split)
    return root


def files_of(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


@pytest.mark.parametrize("kind", PLACES)
def test_a_share_of_whole_groups_is_validation_wherever_the_masks_are(kind, tmp_path):
    root = write_plain(tmp_path, kind)
    before = files_of(root)
    draws = []
    for seed in range(5):
        splits = open_splits(DataOptions(str(root), validation=0.4, groups=BY_CLIP), seed)
        names = {split: dataset.names for split, dataset in splits.items()}
        assert sorted(names["training"] + names["validation"]) == CLIPS
        assert not {x[0] for x in names["training"]} & {x[0] for x in names["validation"]}
        for dataset in splits.values():
            assert [Path(photo).stem for photo, _ in dataset.files] == dataset.names
            assert dataset.groups == [name[:2] for name in dataset.names]
            assert dataset[0]["target"].shape == (24, 20)
        draws.append(tuple(names["validation"]))
    assert len({*draws}) > 1
    assert files_of(root) == before


def test_a_run_on_a_plain_folder_opens_its_photos_again(checkpoints, tmp_path):
    root = write_plain(tmp_path / "data", "side by side")
    out = tmp_path / "run"
    share = "--validation 0.4 --groups ^._ --seed_everything 3".split()
    main(["solve", *places(checkpoints["causal"], root, out), "--folds", "2", *share])
    run = ProbeRun(out)
    splits = open_splits(DataOptions(str(root), validation=0.4, groups=BY_CLIP), 3)
    for split, expected in splits.items():
        assert run.dataset(split).names == expected.names
    assert run.units == len({*splits["validation"].groups})


def test_the_whole_layout_is_shown_at_once_with_the_way_without_splits(tmp_path):
    with pytest.raises(UserError) as error:
        open_splits(DataOptions(str(write_plain(tmp_path, "side by side"))))
    for part in ("images/training", "beside", "classes.json", "--validation 0.3", "--groups REGEX"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.3}, "has splits of its own"),
        ({"groups": "x"}, "add --validation"),
        ({"validation": 0.3, "dataset": "voc2012"}, "voc2012 has splits of its own"),
    ],
)
def test_a_share_of_what_has_splits_is_refused(options, message, segmentation):
    with pytest.raises(UserError, match=message):
        open_splits(DataOptions(str(segmentation), **options))


def test_photos_whose_names_differ_only_in_a_number_are_named(tmp_path):
    root = write_plain(tmp_path, "masks")
    with pytest.warns(UserWarning, match="b_0 and 2 more photos differ only in a number"):
        open_splits(DataOptions(str(root), validation=0.4))
    for number, name in enumerate(CLIPS):
        for folder in ("images", "masks"):
            (root / folder / f"{name}.png").rename(root / folder / f"{chr(97 + number)}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_splits(DataOptions(str(root), validation=0.4))
