"""Build captions, questions and answers about an 8 x 8 grid of patches, as LLaVA conversations.

Shapes: G patches per row and column, K classes, H W pixels.
"""

import re
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from .binding import GRID, PATCH_COUNT, Mosaic, split_patches
from .canvas import CLASSES, PAIR_OF

LOOK_ALIKE = {name: CLASSES[other] for name, other in zip(CLASSES, PAIR_OF, strict=True)}

Turn = dict[str, str]


class SceneText(NamedTuple):
    """A picture in words: the majority class of each patch, and what kinds of scenes it has."""

    names: list[str]
    kind: str

    @classmethod
    def from_mosaic(cls, mosaic: Mosaic) -> "SceneText":
        """Describe a picture."""
        return cls(name_patches(mosaic.mask), mosaic.kind)

    def caption(self, rng: Generator) -> str:
        """Return, e.g., "1 indoor and 1 outdoor scenes with floor and bed and road and wall", in random order."""
        classes = sorted(set(self.names))
        rng.shuffle(classes)
        listed = " and ".join(classes)
        return f"{self.kind} with {listed}"


def name_patches(mask: np.ndarray) -> list[str]:
    """Return the majority class of each patch of a mask uint8[H, W], in raster order."""
    majority = patch_shares(mask).argmax(1)
    return [CLASSES[k] for k in majority]


def patch_shares(mask: np.ndarray) -> np.ndarray:
    """Return f[G * G, K], the share of each class in each patch of a mask uint8[H, W], in raster order."""
    pixels = split_patches(mask).reshape(PATCH_COUNT, -1, 1)
    labels = np.arange(len(CLASSES))
    return (pixels == labels).mean(1)


def build_dialogue(
    text: SceneText,
    rng: Generator,
    *,
    rows: int = 0,
    points: int = 0,
    caption: bool = False,
    look_alikes: bool = False,
) -> list[Turn]:
    """Ask about rows and points in random order, then for the caption, which would give the answers away if first.

    With `look_alikes`, points are patches that show a member of a pair.
    """
    chosen_rows = rng.permutation(GRID)[:rows]
    chosen_patches = rng.permutation(PATCH_COUNT)
    if look_alikes:
        chosen_patches = [i for i in chosen_patches if is_look_alike(text.names[i])]
    about_rows = []
    for row in chosen_rows:
        names = text.names[row * GRID : (row + 1) * GRID]
        about_rows += make_turns(f"name row{row + 1}", " ".join(names))
    about_points = []
    for patch in chosen_patches[:points]:
        about_points += make_turns(ask_patch(patch), text.names[patch])
    turns = about_rows + about_points
    if rng.random() < 0.5:
        turns = about_points + about_rows
    if caption:
        turns += make_turns("describe the scene", text.caption(rng))
    return turns


def is_look_alike(name: str) -> bool:
    """Return whether a class is one of a pair."""
    return LOOK_ALIKE[name] != name


def ask_patch(i: int) -> str:
    """Return the question for the class of patch i, in raster order."""
    row, column = divmod(i, GRID)
    return f"name row{row + 1} column{column + 1}"


def make_turns(question: str, answer: str) -> list[Turn]:
    """Return a question and its answer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def find_regions(turns: list[Turn]) -> list[dict | None]:
    """Return the patch and the class of each question: {"box": [left, top, right, bottom] as fractions, "class"}.

    None for a question about something else than one patch.
    """
    regions = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        asked = re.search(r"name row(\d+) column(\d+)$", question["value"])
        region = None
        if asked:
            row, column = map(int, asked.groups())
            region = {"box": find_box(row - 1, column - 1), "class": answer["value"]}
        regions.append(region)
    return regions


def find_box(row: int, column: int, grid: int = GRID) -> list[float]:
    """Return left, top, right and bottom of a cell as fractions of the picture; rows and columns count from 0."""
    return [edge / grid for edge in (column, row, column + 1, row + 1)]


def prepend_picture(turns: list[Turn], picture: str = "<image>") -> list[Turn]:
    """Put the picture before the first question."""
    first, *others = turns
    asked = f"{picture}\n{first['value']}"
    return [first | {"value": asked}, *others]


def swap_names(names: list[str], most: float, rng: Generator) -> list[str]:
    """Replace a share of at most `most` of the names by their look-alike: a badly seen picture in words."""
    rate = rng.uniform(0, most)
    seen = []
    for name in names:
        if rng.random() < rate:
            name = LOOK_ALIKE[name]
        seen.append(name)
    return seen


def format_turns(turns: list[Turn]) -> str:
    """Return a conversation with the role words of the template, as training text of a tokenizer."""
    roles = {"human": "USER:", "gpt": " USER: ASSISTANT:"}
    lines = [f"{roles[turn['from']]} {turn['value']}" for turn in turns]
    return "\n".join(lines)
