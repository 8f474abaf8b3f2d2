"""Sources with a label for each pixel come back as they were, whatever program wrote them."""

import json
import re
from pathlib import Path

import mask_formats
import numpy as np
import pytest
from mask_formats import CLASSES, COLOURS, Scene, convert
from PIL import Image

from probes.data.folder import FolderDataset

WRITERS = {
    "colour": mask_formats.write_colour,
    "palette": mask_formats.write_palette,
    "panoptic": mask_formats.write_panoptic,
    "ade20k": mask_formats.write_ade20k,
    "datasets": mask_formats.write_datasets,
}


def check_equal(made: dict[str, FolderDataset], splits: dict[str, list[Scene]]) -> None:
    for split, part in splits.items():
        assert len(made[split]) == len(part)
        for scene, sample in zip(part, made[split], strict=True):
            assert (sample["target"] == np.where(scene.classes < 0, 255, scene.classes)).all()


@pytest.mark.parametrize("name", WRITERS)
def test_masks_come_back_as_they_were(name, tmp_path):
    splits = mask_formats.scenes()
    made = convert(WRITERS[name](tmp_path / "from", splits), tmp_path / "out")
    assert made["training"].classes == CLASSES
    check_equal(made, splits)
    expected = [list(colour) for colour in COLOURS] if name in ("colour", "palette") else None
    assert made["training"].palette == expected, "maps of the report have the colours of the masks"
    assert (tmp_path / "out/preview.png").is_file()


def test_segments_that_are_not_listed_are_ignored(tmp_path):
    splits = mask_formats.scenes()
    for scene in splits["training"] + splits["validation"]:
        scene.classes[:3] = -1
    words = [*mask_formats.write_panoptic(tmp_path, splits), "--unlabelled", "sky"]
    check_equal(convert(words, tmp_path / "out"), splits)


def test_more_classes_than_8_bits_have_are_written_and_read(tmp_path, monkeypatch):
    """convert("L") would clip 256 and 3000 to 255."""
    many = [f"class {k}" for k in range(3001)]
    monkeypatch.setattr(mask_formats, "CLASSES", many)
    splits = mask_formats.scenes()
    for scene in splits["training"] + splits["validation"]:
        scene.classes[:] = np.array([255, 256, 300, 3000])[scene.classes]
    made = convert(mask_formats.write_datasets(tmp_path / "from", splits), tmp_path / "out")
    assert made["training"].classes == many
    for split, part in splits.items():
        for scene, sample in zip(part, made[split], strict=True):
            assert (sample["target"] == scene.classes).all()
    mask = Image.open(tmp_path / "out/annotations/training/0.png")
    assert mask.mode.startswith("I")


def test_originals_are_linked_and_stay_as_they_are(tmp_path):
    words = mask_formats.write_colour(tmp_path / "from", mask_formats.scenes())
    photo = tmp_path / "from/JPEGImages/t0.png"
    photo.chmod(0o600)
    convert(words, tmp_path / "out")
    assert photo.samefile(tmp_path / "out/images/training/t0.png")
    assert photo.stat().st_mode & 0o777 == 0o600


def test_a_second_call_does_nothing_and_another_source_is_refused(tmp_path, capsys):
    words = mask_formats.write_colour(tmp_path / "from", mask_formats.scenes())
    convert(words, tmp_path / "out")
    table = capsys.readouterr().out.splitlines()[:5]
    mask = tmp_path / "out/annotations/training/t0.png"
    written = mask.stat()
    convert(words, tmp_path / "out")
    assert mask.stat() == written
    assert capsys.readouterr().out.splitlines()[:5] == table
    mask_formats.save(tmp_path / "from/SegmentationClass/t0.png", np.uint8([[COLOURS[0]]]))
    with pytest.raises(SystemExit, match="other sources or with other rules"):
        convert(words, tmp_path / "out")


def spoil_colour(root: Path) -> None:
    mask = np.array(Image.open(root / "SegmentationClass/t1.png"))
    mask[5, 7] = mask[6, 7] = (1, 2, 3)
    mask_formats.save(root / "SegmentationClass/t1.png", mask)


def make_jpeg(root: Path) -> None:
    file = root / "SegmentationClass/t1.png"
    Image.open(file).save(file.with_suffix(".jpg"))


def empty_split(root: Path) -> None:
    (root / "ImageSets/Segmentation/val.txt").unlink()
    lists = root / "ImageSets/Segmentation/train.txt"
    lists.write_text("\n".join(x.stem for x in (root / "JPEGImages").iterdir()))


def turn(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    photo = root / "JPEGImages/t1.png"
    Image.open(photo).save(photo, exif=exif)


FAULTS = {
    "t1.png: 2 pixels are of no class, e.g. 1,2,3 in row 5, column 7": spoil_colour,
    "t1.jpg is a JPEG, whose compression makes colours": make_jpeg,
    "has no validation photos": empty_split,
    "annotation of t1 is 30 x 40 px, its image .*t1.png 60 x 40": lambda root: mask_formats.save(
        root / "SegmentationClass/t1.png", np.full((40, 30, 3), COLOURS[0], np.uint8)
    ),
    "t1.png has EXIF orientation 3": turn,
    "t1.png has no image": lambda root: (root / "JPEGImages/t1.png").unlink(),
    "labelmap.txt: .*not enough values": lambda root: (root / "labelmap.txt").write_text("sky"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_faulty_source_is_named_and_nothing_is_left(message, tmp_path):
    words = mask_formats.write_colour(tmp_path / "from", mask_formats.scenes())
    FAULTS[message](tmp_path / "from")
    with pytest.raises(SystemExit) as stop:
        convert(words, tmp_path / "out")
    assert re.search(message, str(stop.value.code))
    assert not [x for x in tmp_path.iterdir() if x.name not in ("from", ".out.lock")]


def test_an_id_that_no_mask_can_have_is_refused(tmp_path):
    words = mask_formats.write_datasets(tmp_path / "from", mask_formats.scenes())
    names = tmp_path / "from/id2label.json"
    names.write_text(json.dumps({"0": "sky", "70000": "sea"}))
    with pytest.raises(
        SystemExit, match="id2label.json: the class sea has the id 70000; expected 0 to"
    ):
        convert(words, tmp_path / "out")


def test_a_share_makes_splits_where_a_source_has_none(tmp_path):
    splits = mask_formats.scenes(5)
    words = mask_formats.write_colour(tmp_path / "from", splits)
    for file in (tmp_path / "from/ImageSets/Segmentation").iterdir():
        file.unlink()
    with pytest.raises(SystemExit) as stop:
        convert(words, tmp_path / "out")
    assert stop.value.code == 2
    made = convert([*words, "--validation", "0.3"], tmp_path / "out")
    assert [len(made[split]) for split in ("training", "validation")] == [7, 3]
