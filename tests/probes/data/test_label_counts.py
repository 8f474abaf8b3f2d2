"""Labels that are counted while files are checked, classes that cannot be labelled, and images in both splits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from PIL import Image

from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.data.folder import FolderDataset
from probes.data.probe_data import ProbeData
from probes.data.verify import (
    LabelCounts,
    add_counts,
    check_labels,
    count_labels,
    join_counts,
)
from probes.report.page import write_report
from probes.runs.read import ProbeRun


def masks(root: Path, split: str) -> list[Path]:
    return sorted((root / "annotations" / split).iterdir())


def relabel(
    root: Path,
    split: str,
    old: int,
    new: int,
) -> None:
    for file in masks(root, split):
        mask = np.asarray(Image.open(file)).copy()
        mask[mask == old] = new
        Image.fromarray(mask).save(file)


def write_classes(root: Path, **settings) -> None:
    (root / "classes.json").write_text(json.dumps(settings))


def test_counts_equal_numpy_over_all_masks(segmentation):
    data = ProbeData(str(segmentation))
    data.check_files(data.find_bad_files(0, progress=False))
    for split, counts in data.labels.items():
        found = np.stack([np.asarray(Image.open(file)) for file in masks(segmentation, split)])
        assert counts.images == len(found)
        assert counts.pixels == [int((found == k).sum()) for k in range(3)]
        assert counts.images_of_class == [int((found == k).any((1, 2)).sum()) for k in range(3)]
        assert counts.ignored == (found == 255).sum() > 0
    assert data.notes() == []


def test_parts_of_a_split_add_up():
    targets = np.array([[[0, 1, 255]], [[1, 1, 255]], [[2, 2, 2]]], np.uint8)
    counts = [count_labels(target, 3) for target in targets]
    joined = join_counts([add_counts(counts[:1], 3), add_counts(counts[1:], 3)])
    assert joined == add_counts(counts, 3) == LabelCounts(3, [1, 3, 3], [1, 2, 1], 2)
    depth = np.array([[1.0, np.nan]], np.float32)
    assert add_counts([count_labels(depth, 0)], 0) == LabelCounts(1, [1], [1], 1)


@pytest.mark.parametrize("command", ["verify-data", "fit", "solve"])
def test_masks_of_one_label_are_an_error(command, tmp_path, checkpoints):
    """0 and 255, where 255 was meant to be a class: each probe would be right everywhere."""
    root = tiny_models.write_segmentation(tmp_path / "data")
    for split in ("training", "validation"):
        relabel(root, split, 1, 0)
        relabel(root, split, 2, 255)
    words = [command, "-c", "configs/demo/probes.yaml", "--data.root", str(root)]
    if command != "verify-data":
        words += ["--model.mllm", str(checkpoints["causal"]), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="all labelled training pixels are of the class 'sky'"):
        main(words)


def test_a_listed_class_without_a_training_pixel_is_an_error_with_its_remedy(tmp_path):
    root = tiny_models.write_segmentation(tmp_path / "data", training=15)
    relabel(root, "training", 2, 1)
    names = json.loads((root / "classes.json").read_text())["classes"]
    with pytest.raises(
        SystemExit, match=f"labelled {names[2]}, which classes.json lists.*ignore_index"
    ):
        main(["verify-data", "-c", "folder", "--data.root", str(root)])
    write_classes(root, classes=names, ignore_index=[2, 255])
    main(["verify-data", "-c", "folder", "--data.root", str(root)])
    assert ProbeData(str(root)).classes == names[:2]


def test_few_images_and_published_classes_may_lack_some():
    classes = ["a", "b", "c"]
    labels = {
        "training": LabelCounts(15, [9, 9, 0], [5, 5, 0], 0),
        "validation": LabelCounts(1, [1, 1, 1], [1] * 3, 0),
    }
    with pytest.raises(UserError, match="labelled c"):
        check_labels(classes, labels, True, "data")
    check_labels(classes, labels, False, "data")
    check_labels(
        classes, labels | {"training": labels["training"]._replace(images=14)}, True, "data"
    )


def test_an_ignored_class_has_no_logit(tmp_path):
    """Else a pixel predicted as it would be a class of IoU 0, which no metric that ignores it counts."""
    root = tiny_models.write_segmentation(tmp_path / "data")
    palette = [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    plain = np.stack([item["target"] for item in FolderDataset(root, "training")])
    for ignored in range(3):
        write_classes(
            root,
            classes=["x", "y", "z"],
            ignore_index=[ignored, 255],
            palette=palette,
        )
        dataset = FolderDataset(root, "training")
        kept = [k for k in range(3) if k != ignored]
        assert dataset.classes == ["xyz"[k] for k in kept]
        assert dataset.palette == [palette[k] for k in kept]
        target = np.stack([item["target"] for item in dataset])
        for number, k in enumerate(kept):
            assert ((target == number) == (plain == k)).all()
        assert ((target == 255) == ((plain == 255) | (plain == ignored))).all()
    write_classes(root, classes=["x", "y", "z"], ignore_index=[0, 1])
    with pytest.raises(UserError, match="fewer than two classes"):
        FolderDataset(root, "training")


def test_images_in_both_splits_are_named_from_the_check_to_the_page(tmp_path, checkpoints, capsys):
    root = tiny_models.write_segmentation(tmp_path / "data")
    for kind in ("images", "annotations"):
        shutil.copy(root / kind / "training/002.png", root / kind / "validation/copy.png")
    main(["verify-data", "-c", "folder", "--data.root", str(root)])
    said = capsys.readouterr().out
    assert "warning: 1 image stands in training and in validation, byte for byte" in said
    assert "002 = copy" in said
    words = [
        "-c",
        "configs/demo/probes.yaml",
        "--data.root",
        str(root),
        "--folds",
        "2",
        "--strengths",
        "0.1",
    ]
    words += ["--model.sites", "[encoder]", "--model.mllm", str(checkpoints["causal"])]
    with pytest.warns(UserWarning, match="002 = copy"):
        main(["solve", *words, "--out", str(tmp_path / "run")])
    run = ProbeRun(tmp_path / "run")
    assert run.manifest["data"]["shared_images"] == [["002", "copy"]]
    write_report([str(tmp_path)], tmp_path / "report")
    assert "002 = copy" in (tmp_path / "report/index.html").read_text()
