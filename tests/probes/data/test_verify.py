"""All files are read and their labels counted before a model is loaded; images in both splits are named."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import dataset_layouts
import numpy as np
import pytest
import tiny_models
from PIL import Image

from llava_bidir.common.errors import UserError
from probes.cli import main
from probes.config import DataOptions
from probes.data.probe_data import ProbeData
from probes.data.registry import open_splits
from probes.data.verify import (
    LabelCounts,
    count_labels,
    data_notes,
    group_copies,
    join_counts,
    join_groups,
    notes_of_run,
    read_pairs,
)
from probes.runs.read import ProbeRun
from probes.solve.states import StateReader

MESS = {  # file of annotations/training: what it becomes
    "000.png": np.full((24, 20), 9, np.uint8),
    "001.png": np.full((24, 20), 77, np.uint8),
    "002.png": np.zeros((24, 20, 3), np.uint8),
    "003.png": np.zeros((24, 21), np.uint8),
}


@pytest.fixture
def root(tmp_path) -> Path:
    return tiny_models.write_segmentation(tmp_path / "data")


def masks(root: Path, split: str) -> list[Path]:
    return sorted((root / "annotations" / split).iterdir())


def verify(root: Path, **options) -> ProbeData:
    data = ProbeData(DataOptions(str(root), num_workers=0, **options))
    data.verify(False)
    return data


def test_bad_files_are_listed_before_the_model_is_loaded(root, tmp_path, monkeypatch):
    monkeypatch.delattr("probes.site_probes.load")
    for name, array in MESS.items():
        Image.fromarray(array).save(root / "annotations/training" / name)
    (root / "images/validation/004.png").write_bytes(b"no picture")
    config = ["-c", "configs/demo/probes.yaml", "--data.root", str(root)]
    mllm = str(tiny_models.write_checkpoint(tmp_path / "model"))
    fit = ["fit", *config, "--model.mllm", mllm, "--out", str(tmp_path / "run")]
    for command in (fit, ["verify-data", "--workers", "0", *config]):
        with pytest.raises(SystemExit, match="5 of 11 images cannot be used") as stop:
            main(command)
        named = [name for name in (*MESS, "004.png") if name in str(stop.value.code)]
        assert named == [*MESS, "004.png"]


BORDERED = np.repeat(np.uint8([[0], [255], [1]]), (7, 2, 15), axis=0).repeat(20, axis=1)
EMPTY = {  # where objects have an ignored border, as in VOC, F would be 0 / 0
    "training": r"training targets have no other labels than \[\]",
    "validation": r"validation targets have no other labels than \[\]",
    "boundaries": r"validation .* than \['interior'\]",
}


@pytest.mark.parametrize("case", EMPTY)
def test_a_split_without_a_labelled_pixel_is_an_error_and_a_part_of_one_is_none(case, tmp_path):
    """A wrong ignore_index: probes would be scored untrained, or the scores would fail after the training."""
    root = tiny_models.write_segmentation(tmp_path, 5, 5)
    options, mask = {}, np.full((24, 20), 255, np.uint8)
    if case == "boundaries":
        options, mask = {"task": case}, BORDERED
    files = masks(root, "training" if case == "training" else "validation")
    for file in files[1:]:
        Image.fromarray(mask).save(file)
    verify(root, **options)
    Image.fromarray(mask).save(files[0])
    with pytest.raises(UserError, match=EMPTY[case]):
        verify(root, **options)


def test_workers_and_shares_find_what_one_process_finds(tmp_path):
    root = tiny_models.write_segmentation(tmp_path, training=80)
    for file in masks(root, "training")[3::37]:
        Image.fromarray(np.full((24, 20), 100, np.uint8)).save(file)
    dataset = open_splits(DataOptions(str(root)))["training"]

    def read(indices, workers=0):
        pairs = read_pairs(dataset, "", indices, workers, progress=False)
        return {index: str(pair) for index, pair in pairs.items()}

    alone = read(range(80))
    assert sum("has label 100" in pair for pair in alone.values()) == 3
    assert read(range(80), workers=2) == alone
    assert read(range(0, 80, 2)) | read(range(1, 80, 2)) == alone


def test_incomplete_official_split_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="3 training images, but 20,210 were published"):
        verify(dataset_layouts.write_ade20k(tmp_path), dataset="ade20k")


def test_counts_equal_numpy_over_all_masks(segmentation):
    data = verify(segmentation)
    for split, counts in data.labels.items():
        mask_stack = np.stack([np.asarray(Image.open(file)) for file in masks(segmentation, split)])
        assert counts.images == len(mask_stack)
        assert counts.pixels == [int((mask_stack == k).sum()) for k in range(3)]
        assert counts.images_of_class == [
            int((mask_stack == k).any((1, 2)).sum()) for k in range(3)
        ]
        assert counts.ignored == (mask_stack == 255).sum() > 0
    assert data_notes(data.classes, data.labels, data.remarks) == []
    depth = np.array([[1.0, np.nan]], np.float32)
    assert join_counts([count_labels(depth, 0)] * 2) == LabelCounts(
        images=2, pixels=[2], images_of_class=[2], ignored=2
    )


def test_notes_name_classes_that_lack_pixels_or_images():
    labels = {
        "training": LabelCounts(
            images=9, pixels=[9, 0, 9, 0], images_of_class=[9, 0, 9, 0], ignored=90
        )._asdict(),
        "validation": LabelCounts(
            images=9, pixels=[9, 9, 0, 0], images_of_class=[9, 2, 0, 0], ignored=0
        )._asdict(),
    }
    shared = [["a", "a"], ["b", "c"]]
    notes = notes_of_run([*"wxyz"], {"labels": labels, "shared_images": shared})
    parts = (
        "No training pixel is labelled x, z,",
        "83% of the training pixels are ignored",
        "No validation pixel is labelled y, z:",
        "In fewer than 5 validation images: x (2).",
        "across splits raise scores: a = a, b = c.",
    )
    assert len(notes) == len(parts)
    assert all(sum(part in note for note in notes) == 1 for part in parts)
    assert notes_of_run([*"wxyz"], {}) == []


def test_a_class_without_a_training_pixel_is_a_warning_in_any_number_of_images(tmp_path):
    root = tiny_models.write_segmentation(tmp_path, training=15)
    for file in masks(root, "training"):
        mask = np.asarray(Image.open(file))
        Image.fromarray(np.where(mask == 2, 1, mask).astype(np.uint8)).save(file)
    with pytest.warns(UserWarning, match=f"No training pixel is labelled {tiny_models.CLASSES[2]}"):
        verify(root)


def add_copy(root: Path, source: str, copy: str, suffix: str = ".png") -> None:
    """Add the image and the mask SPLIT/NAME once more under another name; .bmp has the same pixels in other bytes."""
    image = Image.open(root / "images" / f"{source}.png")
    image.save((root / "images" / copy).with_suffix(suffix))
    shutil.copy(root / "annotations" / f"{source}.png", root / "annotations" / f"{copy}.png")


def test_copies_are_named_by_the_check_and_in_the_run_share_a_fold_and_are_drawn_together(
    root, tmp_path, checkpoints, capsys, monkeypatch
):
    """Folds that see their own pixels chose strengths six decades too low."""
    add_copy(root, "training/002", "validation/copy")
    add_copy(root, source="training/001", copy="training/other", suffix=".bmp")
    add_copy(root, source="validation/001", copy="validation/twin", suffix=".bmp")
    sets = ["training/001 = training/other", "training/002 = validation/copy"]
    sets += ["validation/001 = validation/twin"]
    said = ", ".join(sets)
    main(["verify-data", "-c", "folder", "--data.root", str(root)])
    assert said in capsys.readouterr().out
    folds = []
    read_states = StateReader.read

    def record(reader, *arguments, **options):
        folds.append(reader.fold_of.tolist())
        return read_states(reader, *arguments, **options)

    monkeypatch.setattr(StateReader, "read", record)
    words = f"--data.root {root} --folds 2 --strengths 0.1 --model.sites [encoder]".split()
    words += ["--model.mllm", str(checkpoints["causal"]), "--out", str(tmp_path / "run")]
    with pytest.warns(UserWarning, match=said):
        main(["solve", "-c", "configs/demo/probes.yaml", *words])
    assert folds == [[0, 1, 0, 1, 0, 1, 1]]
    run = ProbeRun(tmp_path / "run")
    assert run.manifest["data"]["shared_images"] == [x.split(" = ") for x in sets]
    assert said in str(notes_of_run(run.metrics["classes"], run.manifest["data"]))
    assert (
        len(run.groups) == 7
        and run.groups[1] == run.groups[6]
        and len(set(run.groups.tolist())) == 6
    )
    assert (run.weights[:, 1] == run.weights[:, 6]).all()


def test_groups_that_have_the_same_image_are_one_and_others_as_they_were():
    contents = ["p", "q", "q", "r", "r", "s", "t"]
    #           one group over two images that two pairs of groups share; d alone
    joined_groups = join_groups(["a", "a", "b", "b", "c", "d", "d"], contents)
    assert joined_groups == [0, 0, 0, 0, 0, 1, 1]
    alone = join_groups(["b", "a", "b"], ["p", "q", "r"])
    assert alone == [1, 0, 1]


def test_copies_join_the_groups_of_the_data_set():
    """Groups that have no image in common stay as they were."""
    images = SimpleNamespace(names=["0", "1", "2", "3"], groups=["a", "a", "b", "c"])
    group_copies(images, ["p", "q", "q", "r"])
    assert images.groups == [0, 0, 0, 1]


def test_a_data_set_without_copies_has_no_groups(root):
    """Numbers of runs before copies were looked for stay as they are."""
    data = verify(root)
    assert [split.groups for split in data.splits.values()] == [None, None]
    assert not any(data.remarks.values())


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_masks_whose_colours_stand_in_another_order_are_named_and_their_labels_count(root, order):
    palette = [[0, 0, 0], [200, 0, 0], [0, 200, 0]]
    classes = {"classes": tiny_models.CLASSES, "palette": palette}
    (root / "classes.json").write_text(json.dumps(classes))
    file = masks(root, "validation")[3]
    labels = np.asarray(Image.open(file))
    mask = Image.fromarray(np.where(labels == 2, 1, labels).astype(np.uint8))
    mask.save(file)
    before = verify(root).labels
    # labels that a palette lacks are black, which is no matter where a mask does not have them
    mask.putpalette(sum((palette[k] for k in order), []) + [0, 0, 0] * 254)
    mask.save(file)
    data = verify(root)
    named = ["validation/003"] * (order[0] == 1)
    assert data.labels == before
    assert data.remarks["recoloured_masks"] == named
    notes = data_notes(data.classes, data.labels, data.remarks)
    assert sum("check them: validation/003" in note for note in notes) == len(named)
