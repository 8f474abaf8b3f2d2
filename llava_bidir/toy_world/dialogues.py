"""What is said about a scene: captions, questions and answers on an 8 x 8 grid of patches, as LLaVA conversations.

Shapes: G patches down and across, K classes, H W pixels.
"""

from typing import NamedTuple

import numpy as np

from .canvas import CLASSES, PAIR_OF
from .scenes import Scene

GRID = 8
LOOK_ALIKE = {name: CLASSES[other] for name, other in zip(CLASSES, PAIR_OF, strict=True)}

Turn = dict[str, str]


def patch_shares(mask: np.ndarray, grid: int = GRID) -> np.ndarray:
    """f[G * G, K]: the share of each class in each patch of a mask uint8[H, W], in raster order."""
    side = mask.shape[0] // grid
    patches = mask.reshape(grid, side, grid, side).swapaxes(1, 2).reshape(grid * grid, side * side)
    return (patches[:, :, None] == np.arange(len(CLASSES))).mean(1)


class View(NamedTuple):
    """A scene in words: the name of the class that covers most of each patch, and which kind of scene it is."""

    names: list[str]
    indoor: bool

    @classmethod
    def of(cls, scene: Scene) -> "View":
        return cls([CLASSES[k] for k in patch_shares(scene.mask).argmax(1)], scene.indoor)

    def caption(self, rng: np.random.Generator) -> str:
        """What there is, in random order: "an indoor scene with floor and bed and wall and ceiling"."""
        things = sorted(set(self.names))
        rng.shuffle(things)
        return f"an {'indoor' if self.indoor else 'outdoor'} scene with {' and '.join(things)}"


def dialogue(
    view: View, rng: np.random.Generator, *, rows: int = 0, points: int = 0, captioned: bool = False
) -> list[Turn]:
    """Questions on rows and points in either order, then the caption: said first, it would give the scene away."""
    chosen_rows, chosen_points = rng.permutation(GRID)[:rows], rng.permutation(GRID**2)[:points]
    parts = [
        [_turns(f"name row{r + 1}", " ".join(view.names[r * GRID : (r + 1) * GRID])) for r in chosen_rows],
        [_turns(f"name row{i // GRID + 1} column{i % GRID + 1}", view.names[i]) for i in chosen_points],
    ]
    if rng.random() < 0.5:
        parts.reverse()
    if captioned:
        parts.append([_turns("describe the scene", view.caption(rng))])
    return [turn for part in parts for turns in part for turn in turns]


def _turns(question: str, answer: str) -> list[Turn]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def show(turns: list[Turn], picture: str = "<image>") -> list[Turn]:
    """Puts the picture before the first question."""
    first = {**turns[0], "value": f"{picture}\n{turns[0]['value']}"}
    return [first, *turns[1:]]


def misread(names: list[str], rng: np.random.Generator) -> list[str]:
    """Names with some taken for their look-alike, at a rate drawn anew each time: a picture badly seen, in words."""
    rate = rng.uniform(0, 0.5)
    return [LOOK_ALIKE[name] if rng.random() < rate else name for name in names]


def as_text(turns: list[Turn]) -> str:
    """A conversation as the template writes it, with both forms of its role words, for a tokenizer to learn from."""
    roles = {"human": "USER:", "gpt": " USER: ASSISTANT:"}
    return "\n".join(f"{roles[turn['from']]} {turn['value']}" for turn in turns)
