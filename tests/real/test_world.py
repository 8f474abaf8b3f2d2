"""Conversations in plain English: they are true, give nothing away, and are balanced without the picture."""

import itertools
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from experiments.real.world import CAPTION, KIND, SceneWords, build_conversations, write_world
from probes.worlds.canvas import CLASSES
from probes.worlds.dialogues import GRID
from probes.worlds.scenes import draw_scene

PLACE = re.compile(r"row (\d), column (\d)")


@pytest.fixture(scope="module")
def scenes() -> list[SceneWords]:
    rng = np.random.default_rng(0)
    return [SceneWords.of(draw_scene(rng)) for _ in range(40)]


@pytest.fixture(scope="module")
def records(scenes) -> dict[str, list[dict]]:
    return build_conversations(scenes, val=scenes, scale=0.05, rng=np.random.default_rng(1))


def pairs(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def scene_of(record: dict, scenes: list[SceneWords]) -> SceneWords:
    return scenes[int(record["image"][-9:-4])]


def nouns(text: str) -> set[str]:
    return set(re.findall(r"\b(?:a|the) ([a-z]+)", text)) & set(CLASSES)


def test_the_world_has_rooms_and_streets(tmp_path):
    write_world(tmp_path / "world", scale=0.01, seed=0)
    captions = json.loads((tmp_path / "world/captions.json").read_text())
    answers = [record["conversations"][1]["value"] for record in captions]
    assert {answer.split()[1] for answer in answers} == {"room", "street"}


def test_every_answer_is_true(records, scenes):
    kinds = Counter()
    for record in itertools.chain(*records.values()):
        scene = scene_of(record, scenes)
        grid = np.array(scene.names).reshape(GRID, GRID)
        for question, answer in pairs(record):
            kinds[question.split(",")[0].split()[0]] += 1
            if place := PLACE.search(question):
                row, column = (int(number) - 1 for number in place.groups())
                assert answer == grid[row, column]
                if "is there" in question:
                    assert answer in nouns(question) and len(nouns(question)) == 2
            elif question == KIND:
                assert answer == f"a {scene.kind}"
            elif question == CAPTION:
                assert answer.startswith(f"A {scene.kind} with ")
                assert nouns(answer) == set(scene.names)
                assert answer[-1] == "."
            else:
                assert answer == "\n".join(" ".join(row) for row in grid)
    assert set(kinds) == {"In", "What", "Is", "Describe"}


def test_what_gives_answers_away_comes_after_them(records):
    for record in records["dialogues"]:
        asked = [question for question, _ in pairs(record)]
        assert all(PLACE.search(question) for question in asked[:-3])
        assert asked[-3:-1] == [KIND, CAPTION]
        assert asked[-1].startswith("What is in each row, ")


def test_without_the_picture_exactly_half_of_the_choices_can_be_right(records):
    """Each text is asked equally often with each of its two answers, so that no function of the text does better."""
    answers = defaultdict(Counter)
    for record in records["questions"]:
        question, answer = pairs(record)[0]
        answers[question][answer] += 1
    assert len(answers) > 10
    for question, counts in answers.items():
        assert set(counts) == nouns(question) and len({*counts.values()}) == 1, question


def test_regions_are_the_places_of_the_open_questions(records):
    for record in records["questions"]:
        (_, choice), (question, answer) = pairs(record)
        row, column = (int(number) - 1 for number in PLACE.search(question).groups())
        none, region = record["regions"]
        assert none is None
        assert region["class"] == answer == choice
        edges = (column, row, column + 1, row + 1)
        assert region["box"] == [edge / GRID for edge in edges]
