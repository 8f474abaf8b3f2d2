r"""Describe scenes in plain English, for a language model that knows it.

    In row 3, column 6, is there a bed or a car?     bed
    What is in row 3, column 6?                      bed
    Is this a room or a street?                      a room
    Describe the picture.                            A room with a bed, a ceiling, a floor, a wall and a window.
    What is in each row, from left to right?         ceiling ceiling lamp ... wall\n...

A question that names two classes is asked about two pictures in which different ones are right. Without the picture,
exactly half of the answers can be right.
"""

import numpy as np

from .dialogues import GRID, SceneText, Turn, find_box, make_turns

CAPTION = "Describe the picture."
KIND = "Is this a room or a street?"  # not asked about a montage of several scenes


def describe(text: SceneText, rng: np.random.Generator) -> list[Turn]:
    """Ask for a caption: the kind of scene and its classes in random order."""
    *most, last = (_noun(name) for name in rng.permutation(sorted(set(text.names))))
    listed = f"{', '.join(most)} and {last}" if most else last
    return make_turns(CAPTION, f"A {_kind(text)} with {listed}.")


def build_dialogue(
    text: SceneText,
    other: SceneText,
    rng: np.random.Generator,
    *,
    choices: int,
    points: int,
) -> list[Turn]:
    """Ask for classes in random order, then for what would have given them away: kind, caption and all rows.

    Args:
        text: The scene.
        other: Another scene, which gives the wrong class of each choice.
        rng: Random generator.
        choices: Number of questions that name two classes, fewer if the scenes hardly differ.
        points: Number of questions that name none.
    """
    asked = [
        make_turns(_ask_choice(i, text, other, rng), text.names[i])
        for i in _differ(text, other, rng)[:choices]
    ]
    asked += [make_turns(_ask_point(i), text.names[i]) for i in rng.permutation(GRID**2)[:points]]
    asked = [asked[i] for i in rng.permutation(len(asked))]
    rows = "\n".join(" ".join(row) for row in np.array(text.names).reshape(GRID, GRID))
    if _kind(text) in KIND:
        asked.append(make_turns(KIND, f"a {_kind(text)}"))
    asked.append(describe(text, rng))
    asked += [make_turns("What is in each row, from left to right?", rows)]
    return [turn for turns in asked for turn in turns]


def ask_both(
    first: SceneText, second: SceneText, rng: np.random.Generator
) -> list[tuple[list[Turn], list]]:
    """Return one choice about two scenes in which different classes are right; none if the scenes are alike.

    The open question about the same place follows. Regions are those of :func:`.dialogues.find_regions`.
    """
    place = next(iter(_differ(first, second, rng)), None)
    if place is None:
        return []
    question = _ask_choice(place, first, second, rng)
    asked = []
    for name in (first.names[place], second.names[place]):
        turns = make_turns(question, name) + make_turns(_ask_point(place), name)
        asked.append((turns, [None, {"box": find_box(*divmod(place, GRID)), "class": name}]))
    return asked


def _differ(first: SceneText, second: SceneText, rng: np.random.Generator) -> list[int]:
    """Return the patches at which two scenes have different classes, in random order."""
    return [int(i) for i in rng.permutation(GRID**2) if first.names[i] != second.names[i]]


def _ask_choice(
    place: int,
    first: SceneText,
    second: SceneText,
    rng: np.random.Generator,
) -> str:
    one, two = rng.permutation([_noun(first.names[place]), _noun(second.names[place])])
    return f"In {_place(place)}, is there {one} or {two}?"


def _ask_point(place: int) -> str:
    return f"What is in {_place(place)}?"


def _place(index: int) -> str:
    return f"row {index // GRID + 1}, column {index % GRID + 1}"


def _noun(name: str) -> str:
    return "the sky" if name == "sky" else f"a {name}"


def _kind(text: SceneText) -> str:
    kinds = {"an indoor scene": "room", "an outdoor scene": "street"}
    return kinds.get(text.kind, "montage of rooms and streets")
