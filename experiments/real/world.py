r"""The toy world's scenes, one in a picture, in plain English, for a language model that knows it.

    python -m experiments.real.world OUT SCALE SEED

Look-alikes follow from the rest of the scene, and from a weak grain. The files are those of `probes demo-assets`, but
models. Conversations:

    In row 3, column 6, is there a bed or a car?     bed
    What is in row 3, column 6?                      bed
    Is this a room or a street?                      a room
    Describe the picture.                            A room with a bed, a ceiling, a floor, a wall and a window.
    What is in each row, from left to right?         ceiling ceiling lamp ... wall\n...

A question that names two classes is asked about two pictures in which different ones are right. Without the picture,
exactly half of the answers can be right.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_bidir.common.files import atomic_directory
from probes.worlds.assets import (
    CAPTIONS,
    CHUNK,
    DIALOGUES,
    PICTURES,
    QUESTIONS,
    TRAINING,
    VALIDATION,
    make_record,
    sample_evenly,
    save_pictures,
    write_classes,
)
from probes.worlds.dialogues import GRID, Turn, find_box, make_turns, name_patches
from probes.worlds.questions import CAPTION
from probes.worlds.scenes import Scene, draw_scene

KIND = "Is this a room or a street?"
EVIDENCE = 0.1
# questions of a dialogue, about 330 tokens with the picture
CHOICES = 3
POINTS = 1


class SceneWords(NamedTuple):
    """A picture in words: the majority class of each patch, and the kind of scene."""

    names: list[str]
    kind: str

    @classmethod
    def of(cls, scene: Scene) -> "SceneWords":
        """Describe a picture."""
        kind = "street"
        if scene.indoor:
            kind = "room"
        return cls(name_patches(scene.mask), kind)


def write_world(out: Path, scale: float, seed: int) -> None:
    """Write the pictures and the conversations.

    Args:
        out: Folder. An earlier world is replaced.
        scale: Share of the pictures and conversations.
        seed: Random seed of everything.
    """
    texts = []
    with atomic_directory(out, marker="questions.json") as partial:
        for number, (split, most) in enumerate(PICTURES.items()):
            count = max(16, round(most * scale))
            drawn = []
            for start in range(0, count, CHUNK):
                rng = np.random.default_rng([seed, number, start])
                drawn += [
                    draw_scene(rng, evidence=EVIDENCE) for _ in range(min(CHUNK, count - start))
                ]
            save_pictures(partial, split, drawn)
            texts.append([SceneWords.of(scene) for scene in drawn])
        write_classes(partial)
        rng = np.random.default_rng([seed, 11])
        conversations = build_conversations(texts[0], val=texts[-1], scale=scale, rng=rng)
        for name, records in conversations.items():
            (partial / f"{name}.json").write_text(json.dumps(records) + "\n")


def build_conversations(
    train: list[SceneWords], val: list[SceneWords], scale: float, rng: np.random.Generator
) -> dict[str, list[dict]]:
    """Return the captions of stage 1, the dialogues of stage 2 and the questions, each about two pictures."""
    captions = []
    for i in sample_evenly(rng, len(train), CAPTIONS * scale):
        turns = describe(train[i], rng)
        captions.append(make_record(TRAINING, i, turns))
    dialogues = []
    for i in sample_evenly(rng, len(train), DIALOGUES * scale):
        other = train[rng.integers(len(train))]
        turns = build_dialogue(train[i], other, rng)
        dialogues.append(make_record(TRAINING, i, turns))
    questions = []
    for first in sample_evenly(rng, len(val), QUESTIONS * scale):
        second = int(rng.integers(len(val)))
        asked = ask_both(val[first], val[second], rng)
        for i, (turns, regions) in zip((first, second), asked, strict=False):
            questions.append(make_record(VALIDATION, i, turns) | {"regions": regions})
    return {"captions": captions, "dialogues": dialogues, "questions": questions}


def describe(text: SceneWords, rng: np.random.Generator) -> list[Turn]:
    """Ask for a caption: the kind of scene and its classes in random order."""
    names = rng.permutation(sorted(set(text.names)))
    *most, last = map(_noun, names)
    listed = last
    if most:
        listed = f"{', '.join(most)} and {last}"
    return make_turns(CAPTION, f"A {text.kind} with {listed}.")


def build_dialogue(text: SceneWords, other: SceneWords, rng: np.random.Generator) -> list[Turn]:
    """Ask for classes in random order, then for what would have given them away: kind, caption and all rows.

    Another scene gives the wrong class of each choice.
    """
    asked = []
    for place in _differ(text, other, rng)[:CHOICES]:
        question = _ask_choice(place, first=text, second=other, rng=rng)
        asked.append(make_turns(question, text.names[place]))
    for place in rng.permutation(GRID**2)[:POINTS]:
        asked.append(make_turns(_ask_point(place), text.names[place]))
    turns = []
    for i in rng.permutation(len(asked)):
        turns += asked[i]
    turns += make_turns(KIND, f"a {text.kind}")
    turns += describe(text, rng)
    rows = np.array(text.names).reshape(GRID, GRID)
    listed = "\n".join(" ".join(row) for row in rows)
    return turns + make_turns("What is in each row, from left to right?", listed)


def ask_both(
    first: SceneWords, second: SceneWords, rng: np.random.Generator
) -> list[tuple[list[Turn], list]]:
    """Return one choice about two scenes in which different classes are right; none if the scenes are alike.

    The open question about the same place follows. Regions are those of `probes.worlds.dialogues.find_regions`.
    """
    place = next(iter(_differ(first, second, rng)), None)
    if place is None:
        return []
    question = _ask_choice(place, first=first, second=second, rng=rng)
    asked = []
    for name in (first.names[place], second.names[place]):
        turns = make_turns(question, name) + make_turns(_ask_point(place), name)
        row, column = divmod(place, GRID)
        region = {"box": find_box(row, column), "class": name}
        asked.append((turns, [None, region]))
    return asked


def _differ(first: SceneWords, second: SceneWords, rng: np.random.Generator) -> list[int]:
    """Return the patches at which two scenes have different classes, in random order."""
    return [int(i) for i in rng.permutation(GRID**2) if first.names[i] != second.names[i]]


def _ask_choice(place: int, first: SceneWords, second: SceneWords, rng: np.random.Generator) -> str:
    nouns = [_noun(first.names[place]), _noun(second.names[place])]
    one, two = rng.permutation(nouns)
    return f"In {_place(place)}, is there {one} or {two}?"


def _ask_point(place: int) -> str:
    return f"What is in {_place(place)}?"


def _place(index: int) -> str:
    row, column = divmod(index, GRID)
    return f"row {row + 1}, column {column + 1}"


def _noun(name: str) -> str:
    if name == "sky":
        return "the sky"
    return f"a {name}"


def main(words: list[str]) -> None:
    """Run the script."""
    out, scale, seed = words
    write_world(Path(out), float(scale), int(seed))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
