"""The places that the toy world's questions ask for."""

import numpy as np

from probes.worlds.binding import draw_mosaic
from probes.worlds.canvas import CLASSES, SIZE_PX
from probes.worlds.dialogues import GRID, SceneText, build_dialogue, find_regions, prepend_picture


def test_regions_are_the_patches_of_the_questions_and_their_classes():
    rng = np.random.default_rng(0)
    scene = draw_mosaic(rng, 2)
    turns = prepend_picture(
        build_dialogue(SceneText.from_mosaic(scene), rng, rows=2, points=GRID**2, caption=True)
    )
    regions = find_regions(turns)
    assert len(regions) == len(turns) / 2 == 2 + GRID**2 + 1
    boxes = set()
    for question, region in zip(turns[::2], regions, strict=True):
        assert (region is not None) == ("column" in question["value"])
        if region is not None:
            left, top, right, bottom = (round(edge * SIZE_PX) for edge in region["box"])
            assert (right - left, bottom - top) == (SIZE_PX // GRID, SIZE_PX // GRID)
            shown = scene.mask[top:bottom, left:right].flatten()
            counts = np.bincount(shown, minlength=len(CLASSES))[: len(CLASSES)]
            assert CLASSES[counts.argmax()] == region["class"]
            boxes.add((left, top))
    assert len(boxes) == GRID**2
