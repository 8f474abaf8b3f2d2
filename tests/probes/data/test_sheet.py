"""The sheet shows every class where it can, the masks where they are, and what is ignored."""

import numpy as np
import pytest
import tiny_models
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFont

from probes.cli import main
from probes.data.sheet import PHOTOS, choose_photos, draw_overlay

PALETTE = np.uint8([[200, 0, 0], [0, 0, 200]])


@example(np.array([[1, 1, 1, 0]] * 12 + [[0, 0, 0, 1]]))
@given(
    arrays(np.int64, st.tuples(st.integers(1, 20), st.integers(1, 8)), elements=st.integers(0, 1))
)
def test_every_class_is_on_a_photo(pixels):
    """Eight photos are enough for eight classes."""
    chosen = choose_photos(pixels)
    assert len(set(chosen)) == len(chosen) == min(PHOTOS, len(pixels))
    assert (pixels[chosen].any(0) == pixels.any(0)).all()


def test_a_mask_lies_on_the_photo_where_it_is_and_what_is_ignored_is_hatched():
    target = np.zeros((120, 160), np.uint8)
    target[:, 80:] = 1
    target[100:] = 255
    photo = Image.new("RGB", (160, 120), (100, 100, 100))
    shown = np.asarray(draw_overlay(photo, target, PALETTE, ["left", "right"]))
    assert shown[10, 10].tolist() == [155, 45, 45]  # 0.45 of the photo, 0.55 of the colour
    assert shown[10, 150].tolist() == [45, 45, 155]
    assert (shown[:100, 80] == 255).all()  # the outline
    below = shown[105:, :70]
    assert {tuple(x) for x in below.reshape(-1, 3).tolist()} == {(100, 100, 100), (255, 255, 255)}
    assert (
        not shown[35:55, 25:55].any(-1).all()
    )  # the name's black rim, in the middle of the region


@pytest.mark.parametrize("edge", ["left", "right"])
def test_the_name_of_a_narrow_region_at_an_edge_is_whole(edge):
    target = np.zeros((60, 160), np.uint8)
    side = np.s_[:16] if edge == "left" else np.s_[-16:]
    target[:, side] = 1
    photo = Image.new("RGB", (160, 60))
    drawn = [
        np.asarray(draw_overlay(photo, target, np.zeros((2, 3)), ["", name]))
        for name in ("", "vegetation")
    ]
    columns = np.flatnonzero((drawn[0] != drawn[1]).any((0, 2)))
    length = ImageFont.load_default().getlength("vegetation")
    assert np.ptp(columns) > length - 3
    assert columns.min() > 0
    assert columns.max() < 159


def test_verify_data_makes_the_sheet(tmp_path, capsys):
    root = tiny_models.write_segmentation(tmp_path / "data")
    words = ["verify-data", "--data.root", str(root), "--preview", str(tmp_path / "sheet.png")]
    main(words)
    assert Image.open(tmp_path / "sheet.png").size[0] == 1640
    assert "sheet.png: do the masks fit?" in capsys.readouterr().out


def test_a_task_without_classes_has_no_sheet(tmp_path):
    from dataset_layouts import write_folder_targets

    root = write_folder_targets(tmp_path)
    with pytest.raises(SystemExit, match="depth has none"):
        main(
            ["verify-data", "--data.root", str(root), "--data.task", "depth", "--preview", "x.png"]
        )
