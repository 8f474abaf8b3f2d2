"""The binding world: what tells look-alikes apart, and what does not."""

import json

import numpy as np
import pytest

from llava_bidir.toy_world.binding import (
    CUE_CLASSES,
    CUES,
    GRID,
    HUES,
    IGNORED,
    PATCH_PX,
    Mosaic,
    draw_mosaic,
    hue_colours,
    mix_mosaics,
)
from llava_bidir.toy_world.canvas import CLASSES, PAIR_OF
from llava_bidir.toy_world.dialogues import LOOK_ALIKE, patch_shares

ROOM_CUES = {"lamp", "picture"}
STREET_CUES = {"tree"}
ROOMS = {"ceiling", "wall", "floor", "bed"}
PATCHES = [(row, column) for row in range(GRID) for column in range(GRID)]


@pytest.fixture(scope="module", params=[1, 2, 4])
def mosaics(request) -> list[Mosaic]:
    scenes = request.param
    rng = np.random.default_rng(scenes)
    drawn = [draw_mosaic(rng, scenes) for _ in range(10)]
    return drawn + mix_mosaics(rng, [scenes] * 150)


def patch(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    top = row * PATCH_PX
    left = column * PATCH_PX
    return pixels[top : top + PATCH_PX, left : left + PATCH_PX]


def names_by_hue(mosaic: Mosaic) -> dict[tuple, list[set[str]]]:
    """The classes of the patches with each colour of border, from the pixels and the mask alone."""
    found: dict[tuple, list[set[str]]] = {}
    for row, column in PATCHES:
        colour = tuple(patch(mosaic.image, row, column)[0, 0].tolist())
        labels = patch(mosaic.mask, row, column)
        names = {CLASSES[k] for k in np.unique(labels[labels != IGNORED])}
        found.setdefault(colour, []).append(names)
    return found


def test_a_border_of_one_pixel_has_the_hue_of_the_scene_and_no_class(mosaics):
    for mosaic in mosaics:
        for t, (row, column) in enumerate(PATCHES):
            pixels = patch(mosaic.image, row, column)
            labels = patch(mosaic.mask, row, column)
            expected = hue_colours()[mosaic.hues[mosaic.scene[t]]]
            for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
                assert (edge == expected).all()
            assert (labels != IGNORED).sum() == (PATCH_PX - 2) ** 2
            assert (labels[1:-1, 1:-1] < len(CLASSES)).all()
    assert len(np.unique(hue_colours(), axis=0)) == HUES


def test_look_alikes_follow_from_the_cues_of_their_own_scene_and_of_no_other(mosaics):
    """A reader of borders and cues is always right; one that takes the cues of another scene is at chance."""
    own = []
    other = []
    for mosaic in mosaics:
        scenes = [set().union(*patches) for patches in names_by_hue(mosaic).values()]
        assert len(scenes) == len(mosaic.indoor)
        for i, names in enumerate(scenes):
            assert bool(names & ROOM_CUES) != bool(names & STREET_CUES)
            look_alikes = [name for name in names if LOOK_ALIKE[name] != name]
            own += [(name in ROOMS) == bool(names & ROOM_CUES) for name in look_alikes]
            other += [(name in ROOMS) == bool(scenes[i - 1] & ROOM_CUES) for name in look_alikes]
    assert all(own)
    if len(mosaics[0].indoor) > 1:  # else the other scene is the same
        assert 0.35 < np.mean(other) < 0.65


def test_each_scene_has_as_many_patches_and_enough_cues(mosaics):
    for mosaic in mosaics:
        count = len(mosaic.indoor)
        assert (np.bincount(mosaic.scene, minlength=count) == GRID**2 // count).all()
        assert len(set(mosaic.hues.tolist())) == count
        known = np.where(mosaic.mask == IGNORED, 0, mosaic.mask)
        shares = patch_shares(known)[:, CUE_CLASSES].sum(1)
        assert (np.bincount(mosaic.scene[shares > 0.15], minlength=count) >= CUES).all()
        assert (shares[mosaic.cue] > 0.15).all()


def test_position_alone_does_not_tell_look_alikes_apart():
    """A reader of the appearance and the place, taught by 150 pictures, is right on half of 150 others."""
    rng = np.random.default_rng(0)
    drawn = mix_mosaics(rng, [4] * 150) + mix_mosaics(rng, [4] * 150)
    other = np.array(PAIR_OF)
    labels = np.stack([patch_shares(mosaic.mask).argmax(1) for mosaic in drawn])
    pair = np.minimum(labels, other[labels])  # the first class of a pair stands for its appearance
    places = np.arange(GRID**2)
    votes = np.zeros((len(CLASSES), GRID**2))
    for shown, said in zip(pair[:150], labels[:150], strict=True):
        votes[shown, places] += np.where(said == shown, 1, -1)
    pair = pair[150:]
    truth = labels[150:]
    guess = np.where(votes[pair, places] > 0, pair, other[pair])
    ambiguous = other[truth] != truth
    assert 0.46 < (guess == truth)[ambiguous].mean() < 0.54


def test_world_has_pictures_of_several_scenes_and_of_one_and_asks_about_look_alikes(world):
    for folder, splits in (("segmentation", 2), ("one_scene", 2), ("llava", 1)):
        classes = json.loads((world / folder / "classes.json").read_text())
        assert classes["ignore_index"] == IGNORED
        assert len(list((world / folder / "images").iterdir())) == splits
    patches = json.loads((world / "segmentation/patches.json").read_text())
    assert {split: len(entries) for split, entries in patches.items()} == {
        "training": 16,
        "validation": 16,
    }
    assert all(
        sorted(set(entry["scene"])) == [0, 1] and len(entry["cue"]) == 64
        for entry in patches["validation"]
    )
    questions = json.loads((world / "questions.json").read_text())
    assert questions and all(
        LOOK_ALIKE[q["regions"][0]["class"]] != q["regions"][0]["class"] for q in questions
    )
    for record in json.loads((world / "dialogues.json").read_text()):
        assert "image" not in record or (world / record["image"]).is_file()
