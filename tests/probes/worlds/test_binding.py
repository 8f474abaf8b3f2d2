"""The binding world: what tells look-alikes apart, and what does not."""

import numpy as np
import pytest

from probes.worlds.binding import GRID, IGNORED, PATCH_PX, Mosaic, draw_mosaic, mix_mosaics
from probes.worlds.canvas import CLASSES, PAIR_OF
from probes.worlds.dialogues import LOOK_ALIKE, patch_shares

ROOM_CUES = {"lamp", "picture"}
STREET_CUES = {"tree"}
ROOMS = {"ceiling", "wall", "floor", "bed"}
PATCHES = [(row, column) for row in range(GRID) for column in range(GRID)]


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


@pytest.fixture(scope="module")
def mosaics() -> list[Mosaic]:
    """Pictures of one scene and of four, 150 of these from a pool of scenes."""
    rng = np.random.default_rng(4)
    drawn = [draw_mosaic(rng, scenes) for scenes in 5 * [1, 4]]
    return drawn + mix_mosaics(rng, 20 * [1] + 150 * [4])


def test_look_alikes_follow_from_the_cues_of_their_own_scene_and_of_no_other(mosaics):
    """A reader of borders and cues is always right; one that takes the cues of another scene is at chance."""
    follows_own_scene = []
    other = []
    for mosaic in mosaics:
        scenes = [set().union(*patches) for patches in names_by_hue(mosaic).values()]
        assert len(scenes) == len(mosaic.indoor)
        for i, names in enumerate(scenes):
            assert bool(names & ROOM_CUES) != bool(names & STREET_CUES)
            look_alikes = [name for name in names if LOOK_ALIKE[name] != name]
            follows_own_scene += [
                (name in ROOMS) == bool(names & ROOM_CUES) for name in look_alikes
            ]
            if len(scenes) > 1:
                cues = scenes[i - 1] & ROOM_CUES
                other += [(name in ROOMS) == bool(cues) for name in look_alikes]
    assert all(follows_own_scene)
    assert 0.35 < np.mean(other) < 0.65


def test_position_alone_does_not_tell_look_alikes_apart(mosaics):
    """A reader of the appearance and the place, taught by 150 pictures, is right on half of 150 others."""
    drawn = mosaics[-150:] + mix_mosaics(np.random.default_rng(0), [4] * 150)
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
