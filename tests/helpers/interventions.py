"""Knockouts and hooks of the package on a tiny model of any family, each with what it means for the stock model."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from stock_answers import Change
from tiny_families import SEVERAL_WAYS_IN, STOCK, WORDS
from torch import Tensor

from probes import Knockout

Cut = Callable[[dict[str, Tensor]], Tensor]

HELLO = WORDS["hello"]
QUESTIONS = {"hello": [HELLO], "hellohellohello": [HELLO] * 3}
ANSWERS = ["hello", "hellohello"]


def spoken(tokens: list[int]) -> str:
    """Return ids as text, in place of what a tokenizer decodes, so that special ones are compared, too."""
    return " ".join(map(str, tokens))


def pictures(name: str, count: int = 2) -> list[Image.Image]:
    """Return pictures of random pixels, of the side that a family reads."""
    side = STOCK[name].image_px
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 255, (side, side, 3), np.uint8)) for _ in range(count)
    ]


def pairs(rows: tuple[str, ...], columns: tuple[str, ...]) -> Cut:
    """Return a function of the pairs of named tokens, bool[N, N]."""

    def cut(sets):
        queries = sum(sets[name] for name in rows) > 0
        keys = sum(sets[name] for name in columns) > 0
        return queries[:, None] & keys[None]

    return cut


def blocked_tokens(name: str, images: int) -> Tensor:
    """Other tokens of each image, bool[B, T]; never the first one, which may be all that a token sees."""
    tokens = STOCK[name].grid[0] * STOCK[name].grid[1]
    place = torch.arange(tokens)
    return torch.stack([(place > 0) & ((place + image) % 3 == 1) for image in range(images)])


def cut_blocked(blocked: Tensor) -> Cut:
    """Return a function of the pairs of Eq. 1, bool[B, N, N]."""

    def cut(sets):
        image = sets["image"]
        keys = torch.zeros(len(blocked), len(image), dtype=torch.bool)
        keys[:, image] = blocked
        return image[None, :, None] & keys[:, None]

    return cut


def interventions(name: str, images: int) -> dict[str, tuple[dict, Change]]:
    """Return keywords of the package and what they mean, by a name."""
    blocked = blocked_tokens(name, images)
    text = ("question", "last", "answer")
    to_image = Change(pairs(text, ("image",)), (1, 3))
    found = {
        "none": ({}, Change()),
        "Eq. 1": ({"knockout": Knockout(blocked)}, Change(cut_blocked(blocked))),
        "text to image": (
            {"knockout": Knockout(layers=[1, 3], rows=text, columns="image")},
            to_image,
        ),
        "last to question": (
            {"knockout": Knockout(rows="last", columns="question")},
            Change(pairs(("last",), ("question",))),
        ),
    }
    if STOCK[name].native == "prefix":
        found["image to question"] = (
            {"knockout": Knockout(rows="image", columns="question")},
            Change(pairs(("image",), ("question",))),
        )
    hooks = {"adapter": lambda states: states.flip(1), "layer_02": lambda states: states * 0.5}
    for known in ("none", "text to image"):
        arguments, change = found[known]
        name_with = "patched" if known == "none" else f"{known}, patched"
        by_layer = {0: hooks["adapter"], 2: hooks["layer_02"]}
        changed = Change(change.cut, change.layers, by_layer)
        found[name_with] = (arguments | {"hooks": hooks}, changed)
    return found


def possible(name: str, images: int) -> dict[str, tuple[dict, Change]]:
    """Return the interventions that a family can take."""
    all_of_them = interventions(name, images)
    if not STOCK[name].masks:
        return {key: value for key, value in all_of_them.items() if key in ("none", "patched")}
    if name in SEVERAL_WAYS_IN:
        return {key: value for key, value in all_of_them.items() if "patched" not in key}
    return all_of_them
