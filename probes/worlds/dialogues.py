"""Build captions, questions and answers about an 8 x 8 grid of patches, as LLaVA conversations.

Shapes: G patches per row and column, K classes, H W pixels.
"""

import re
from typing import NamedTuple

import numpy as np

from .binding import GRID, Mosaic, split_patches
from .canvas import CLASSES, PAIR_OF

LOOK_ALIKE = {name: CLASSES[other] for name, other in zip(CLASSES, PAIR_OF, strict=True)}

Turn = dict[str, str]


def patch_shares(mask: np.ndarray) -> np.ndarray:
    """Return f[G * G, K], the share of each class in each patch of a mask uint8[H, W], in raster order."""
    patches = split_patches(mask).reshape(GRID**2, -1, 1)
    return (patches == np.arange(len(CLASSES))).mean(1)


def name_patches(mask: np.ndarray) -> list[str]:
    """Return the majority class of each patch of a mask uint8[H, W], in raster order."""
    return [CLASSES[k] for k in patch_shares(mask).argmax(1)]


class SceneText(NamedTuple):
    """A picture in words: the majority class of each patch, and what kinds of scenes it has."""

    names: list[str]
    kind: str

    @classmethod
    def from_mosaic(cls, mosaic: Mosaic) -> "SceneText":
        """Describe a picture."""
        return cls(name_patches(mosaic.mask), mosaic.kind)

    def caption(self, rng: np.random.Generator) -> str:
        """Return, e.g., "1 indoor and 1 outdoor scenes with floor and bed and road and wall", in random order."""
        classes = sorted(set(self.names))
        rng.shuffle(classes)
        return f"{self.kind} with {' and '.join(classes)}"


def build_dialogue(
    text: SceneText,
    rng: np.random.Generator,
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
    chosen_points = rng.permutation(GRID**2)
    if look_alikes:
        chosen_points = [i for i in chosen_points if LOOK_ALIKE[text.names[i]] != text.names[i]]
    chosen_points = chosen_points[:points]
    parts = [
        [
            make_turns(f"name row{r + 1}", " ".join(text.names[r * GRID : (r + 1) * GRID]))
            for r in chosen_rows
        ],
        [make_turns(ask_patch(i), text.names[i]) for i in chosen_points],
    ]
    if rng.random() < 0.5:
        parts.reverse()
    if caption:
        parts.append([make_turns("describe the scene", text.caption(rng))])
    return [turn for part in parts for turns in part for turn in turns]


def ask_patch(i: int) -> str:
    """Return the question for the class of patch i, in raster order."""
    return f"name row{i // GRID + 1} column{i % GRID + 1}"


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
        box = asked and find_box(*(int(number) - 1 for number in asked.groups()))
        regions.append(box and {"box": box, "class": answer["value"]})
    return regions


def find_box(row: int, column: int, grid: int = GRID) -> list[float]:
    """Return left, top, right and bottom of a cell as fractions of the picture; rows and columns count from 0."""
    return [edge / grid for edge in (column, row, column + 1, row + 1)]


def prepend_picture(turns: list[Turn], picture: str = "<image>") -> list[Turn]:
    """Put the picture before the first question."""
    first = {**turns[0], "value": f"{picture}\n{turns[0]['value']}"}
    return [first, *turns[1:]]


def swap_names(names: list[str], most: float, rng: np.random.Generator) -> list[str]:
    """Replace a share of at most `most` of the names by their look-alike: a badly seen picture in words."""
    rate = rng.uniform(0, most)
    return [LOOK_ALIKE[name] if rng.random() < rate else name for name in names]


def format_turns(turns: list[Turn]) -> str:
    """Return a conversation with the role words of the template, as training text of a tokenizer."""
    roles = {"human": "USER:", "gpt": " USER: ASSISTANT:"}
    return "\n".join(f"{roles[turn['from']]} {turn['value']}" for turn in turns)
