"""The official layouts: classes and ignored pixels against independent tables, and errors of wrong layouts."""

import hashlib
import unicodedata

import dataset_layouts
import numpy as np
import pytest
from PIL import Image

from llava_bidir.common.errors import UserError
from probes.data import ade20k, voc2012
from probes.data.file_layout import files_by_name, pair_files
from probes.data.registry import open_dataset

# cityscapesScripts' labels.py: the ids with a trainId, which count from 0
TRAIN_IDS = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]


@pytest.fixture
def voc(tmp_path):
    return dataset_layouts.write_voc2012(tmp_path / "VOCdevkit/VOC2012")


def raw(path):
    return np.asarray(Image.open(path))


def expected(raw, table):
    """Label by label, with the table as a dict; what is not in it is ignored."""
    return np.vectorize(lambda label: table.get(int(label), 255))(raw)


def test_ade20k_has_150_classes_from_label_1_on(tmp_path):
    ade = dataset_layouts.write_ade20k(tmp_path)
    training, data = (open_dataset("ade20k", ade, split) for split in ("training", "validation"))
    assert (len(training), len(data), len(data.classes)) == (3, 2, 150)
    for i, name in enumerate(("ADE_val_00000001", "ADE_val_00000002")):
        labels = raw(ade / f"annotations/validation/{name}.png")
        assert data[i]["name"] == name
        assert {0, 1, 2, 150} <= set(labels.flat)
        assert (data[i]["target"] == expected(labels, {k: k - 1 for k in range(1, 151)})).all()


def test_classes_have_the_names_of_the_published_lists():
    """A digest of the first names in objectInfo150.txt; VOC's follow the background in alphabetical order."""
    digest = hashlib.sha256("\n".join(ade20k.CLASSES).encode()).hexdigest()
    assert digest.startswith("ffd47f2fcbad6c48")
    assert voc2012.CLASSES[1:] == sorted(voc2012.CLASSES[1:])


@pytest.mark.parametrize("above", ["", "..", "../.."])
def test_voc2012_trains_on_the_augmented_list_without_background(voc, above):
    root = voc / above
    training, data = (open_dataset("voc2012", root, split) for split in ("training", "validation"))
    assert training.names == ["2007_000032", "2007_000039", "2008_000002"], "sorted"
    assert data.names == ["2007_000033", "2007_000042"]
    assert len(data.classes) == 20
    assert data.classes[0] == "aeroplane"
    assert data.classes[-1] == "tvmonitor"
    for sample, file in (
        (data[0], "SegmentationClass/2007_000033.png"),
        (training[0], "SegmentationClass/2007_000032.png"),  # not SBD's
        (training[2], "SegmentationClassAug/2008_000002.png"),
    ):
        mask = expected(raw(voc / file), {k: k - 1 for k in range(1, 21)})
        assert (sample["target"] == mask).all()


def test_voc2012_with_background_has_21_classes(voc):
    data = open_dataset("voc2012", root=voc, split="validation", options={"background": "class"})
    assert len(data.classes) == 21
    assert data.classes[0] == "background"
    assert (data[0]["target"] == raw(voc / "SegmentationClass/2007_000033.png")).all()
    assert {0, 20, 255} <= set(data[0]["target"].flat)


def test_voc2012_lists_come_in_several_forms(voc):
    lists = voc / "ImageSets/Segmentation"
    augmented = open_dataset("voc2012", voc, "training").names
    (lists / "trainaug.txt").unlink()
    line = "/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png\n"
    (lists / "aug.txt").write_text(line)
    assert open_dataset("voc2012", voc, "training").names == augmented
    plain = open_dataset("voc2012", root=voc, split="training", options={"train_list": "train"})
    assert plain.names == ["2007_000032", "2007_000039"]


@pytest.mark.parametrize("part", ["SegmentationClassAug", "ImageSets/Segmentation/trainaug.txt"])
def test_voc2012_without_the_augmentation_says_what_to_do(voc, part):
    (voc / part).rename(voc / "away")
    with pytest.raises(UserError, match="masks of SBD.*data.options.train_list: train"):
        open_dataset("voc2012", voc, "training")


def test_cityscapes_has_19_classes_and_cities(tmp_path):
    city = dataset_layouts.write_cityscapes(tmp_path)
    training, data = (
        open_dataset("cityscapes", city, split) for split in ("training", "validation")
    )
    assert training.groups == ["aachen", "aachen", "ulm"]
    assert data.groups == ["munster"] * 2
    assert len(data.classes) == 19
    assert data.classes[10] == "sky"
    assert data.classes[18] == "bicycle"
    for i in range(2):
        ids = raw(city / f"gtFine/val/munster/munster_{i:06d}_000019_gtFine_labelIds.png")
        assert (data[i]["target"] == expected(ids, {k: i for i, k in enumerate(TRAIN_IDS)})).all()
        assert set(range(19)) | {255} == set(data[i]["target"].flat)
    path = city / "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png"
    Image.fromarray(dataset_layouts.labels(0, [*range(19), 255])).save(path)
    with pytest.raises(UserError, match="has label 255; expected 7 to 33 for the 19 classes"):
        data[0]


def test_wrong_root_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="lacks .*, which the dataset's .*contains"):
        open_dataset("cityscapes", tmp_path, "training")


OPTIONS = {  # of layouts: what the error names
    ("voc2012", "backgound", "class"): "'voc2012': .*'backgound'",
    ("voc2012", "background", "Class"): "'voc2012': .*\"background\".*'ignore', 'class'.*: Class",
}


@pytest.mark.parametrize("given", OPTIONS)
def test_options_are_those_of_the_layout(given):
    layout, name, value = given
    with pytest.raises(UserError, match=f"(?s){OPTIONS[given]}"):
        open_dataset(layout, root="anywhere", split="training", options={name: value})


def test_hidden_files_of_macos_are_skipped_and_accents_are_matched(tmp_path):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert composed != apart
    for folder, name in (("images", apart), ("masks", composed)):
        (tmp_path / folder).mkdir()
        for file in (f"{name}.png", f"._{name}.png", "._other.png", "a.png"):
            (tmp_path / folder / file).write_bytes(b"")
    images, masks = (files_by_name(tmp_path / folder, [".png"]) for folder in ("images", "masks"))
    assert list(images) == list(masks) == ["a", composed]
    assert len(pair_files(images, masks, "x")) == 2
    (tmp_path / "images" / f"{composed}.png").write_bytes(b"")
    with pytest.raises(UserError, match="have the same name; remove one"):
        files_by_name(tmp_path / "images", [".png"])
