"""Describe scenes in plain English, for a language model that knows it.

    What is in row 3, from left to right?     wall, wall, window, window, wall, bed, bed, wall
    In row 3, column 6, is there a bed or a car?   bed
    What is in row 3, column 6?               bed
    Describe the picture.                     A room with a bed, a ceiling, a floor, a wall and a window.

A question that names two classes is asked about two pictures in which different ones are right. Without the picture,
exactly half of the answers can be right.
"""

import numpy as np

from .dialogues import GRID, SceneText, Turn, find_box, make_turns

QUESTION = "What is in row {row}, column {column}?"


def describe(text: SceneText, rng: np.random.Generator) -> list[Turn]:
    """Ask for a caption: the kind of scene and its classes in random order."""
    *most, last = (_noun(name) for name in rng.permutation(sorted(set(text.names))))
    listed = f"{', '.join(most)} and {last}" if most else last
    return make_turns("Describe the picture.", f"A {'room' if text.indoor else 'street'} with {listed}.")


def build_dialogue(
    text: SceneText, other: SceneText, rng: np.random.Generator, *, rows: int, choices: int, points: int
) -> list[Turn]:
    """Ask about rows, choices and points in random order, then for the caption, which would give answers away if first.

    Args:
        text: The scene.
        other: another scene, which gives the wrong class of each choice.
        rng: Random generator.
        rows, choices, points: Number of questions of each kind.
    """
    names = np.array(text.names).reshape(GRID, GRID)
    asked = [
        make_turns(f"What is in row {row + 1}, from left to right?", ", ".join(names[row]))
        for row in rng.permutation(GRID)[:rows]
    ]
    asked += [make_turns(_question(place, text, other, rng), text.names[place]) for place in _differ(text, other, rng)][
        :choices
    ]
    asked += [make_turns(QUESTION.format(**_place(i)), text.names[i]) for i in rng.permutation(GRID**2)[:points]]
    ordered = [asked[i] for i in rng.permutation(len(asked))]
    return [turn for turns in (*ordered, describe(text, rng)) for turn in turns]


def ask_both(first: SceneText, second: SceneText, rng: np.random.Generator) -> list[tuple[list[Turn], list]]:
    """Return one choice about two scenes in which different classes are right, with regions; none if they are alike.

    The open question about the same place follows, with its region as :func:`.dialogues.find_regions` returns it.
    """
    place = next(iter(_differ(first, second, rng)), None)
    if place is None:
        return []
    question, asked = _question(place, first, second, rng), []
    for text in (first, second):
        name = text.names[place]
        turns = make_turns(question, name) + make_turns(QUESTION.format(**_place(place)), name)
        asked.append((turns, [None, {"box": find_box(*divmod(place, GRID)), "class": name}]))
    return asked


def _differ(first: SceneText, second: SceneText, rng: np.random.Generator) -> list[int]:
    """Return the patches at which two scenes have different classes, in random order."""
    return [int(i) for i in rng.permutation(GRID**2) if first.names[i] != second.names[i]]


def _question(place: int, first: SceneText, second: SceneText, rng: np.random.Generator) -> str:
    one, two = rng.permutation([_noun(first.names[place]), _noun(second.names[place])])
    return "In row {row}, column {column}, is there ".format(**_place(place)) + f"{one} or {two}?"


def _place(index: int) -> dict[str, int]:
    return {"row": index // GRID + 1, "column": index % GRID + 1}


def _noun(name: str) -> str:
    return "the sky" if name == "sky" else f"a {name}"
