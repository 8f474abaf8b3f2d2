"""Questions from masks: true by a loop over pixels, in half right for the blind, and what `probes routes` reads."""

import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probes.analyses.routes.questions import read_questions
from probes.cli import main
from probes.data.folder import FolderDataset

NAMES = ["road", "sky", "car", "tree"]
GRID = 3
SIDE = (37, 50)  # no multiple of the grid
UNKNOWN = 255


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Thirty photos of five blocks by four; label 0 is no class, and some blocks have it."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("training", 20), ("validation", 10)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            # not all classes are in each photo
            shown = rng.permutation(len(NAMES) + 1)[:3]
            blocks = rng.choice(shown, (4, 5)).astype(np.uint8)
            mask = Image.fromarray(blocks).resize(SIDE[::-1], Image.Resampling.NEAREST)
            mask.save(root / f"annotations/{split}/{i}.png")
            Image.new("RGB", SIDE[::-1]).save(root / f"images/{split}/{i}.jpg")
    settings = {"classes": NAMES, "reduce_zero_label": True}
    (root / "classes.json").write_text(json.dumps(settings))
    return root


@pytest.fixture(scope="module")
def records(data, tmp_path_factory) -> dict[str, list[dict]]:
    """The files of the command by name."""
    out = tmp_path_factory.mktemp("out")
    main(["questions", str(data), "--out", str(out), "--grid", str(GRID), "--held-out", "40"])
    return {file.stem: json.loads(file.read_text()) for file in out.iterdir()}


def pairs(record: dict) -> list[tuple[str, str]]:
    """Return questions and answers of a record."""
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


@pytest.fixture(scope="module")
def masks(data: Path) -> dict[str, list[list[int]]]:
    """Return class indices as the probes' own reader of folders has them."""
    masks = {}
    for split in ("training", "validation"):
        dataset = FolderDataset(data, split)
        for i, name in enumerate(dataset.names):
            masks[f"images/{split}/{name}.jpg"] = dataset[i]["target"].tolist()
    return masks


def majority(mask: list[list[int]], row: int, column: int) -> str | None:
    """Return the class of more than half of the pixels of a cell, by a loop over all pixels."""
    (top, bottom), (left, right) = (
        (round(at * side / GRID), round((at + 1) * side / GRID))
        for at, side in zip((row, column), SIDE, strict=True)
    )
    inside = [mask[y][x] for y in range(top, bottom) for x in range(left, right)]
    for index, name in enumerate(NAMES):
        if 2 * inside.count(index) > len(inside):
            return name
    return None


def is_true(question: str, answer: str, mask: list[list[int]]) -> bool:
    """Return whether an answer follows from the mask."""
    if about := re.fullmatch(r"Is there any (\w+) in the picture\?", question):
        shown = NAMES.index(about[1]) in {value for row in mask for value in row}
        return answer == ("yes" if shown else "no")
    if place := re.match(r"Which is in row (\d), column (\d):", question):
        return majority(mask, int(place[1]) - 1, int(place[2]) - 1) == answer
    about = re.match(r"Which is left of the (\w+):", question)[1]
    beside = []
    for row in range(GRID):
        names = [majority(mask, row, column) for column in range(GRID)]
        pairs = itertools.pairwise(names)
        beside += [left for left, right in pairs if right == about and left not in (None, about)]
    return 2 * beside.count(answer) > len(beside)


def test_every_answer_is_true(masks, records):
    kinds = Counter()
    for record in records["dialogues"] + records["questions"]:
        for question, answer in pairs(record):
            kinds[question.split()[2]] += 1
            assert is_true(question, answer, masks[record["image"]]), (question, answer)
    assert kinds.total() > 100
    assert set(kinds) == {"any", "left", "in"}


def test_without_the_photo_exactly_half_of_the_answers_can_be_right(records):
    for name in ("dialogues", "questions"):
        answers = defaultdict(Counter)
        for question, answer in itertools.chain(*map(pairs, records[name])):
            answers[question][answer] += 1
        best = sum(max(counts.values()) for counts in answers.values())
        assert 2 * best == sum(counts.total() for counts in answers.values())


def test_probes_answers_reads_the_regions_and_each_shows_its_class(masks, records, tmp_path):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(records["questions"]))
    read = read_questions(file, NAMES)
    with_region = [record for record in records["questions"] if record["regions"] != [None]]
    assert len(read.questions) == len(with_region) > 20
    for question in read.questions:
        left, top, _, _ = question.box
        cell = round(top * GRID), round(left * GRID)
        assert majority(masks[read.images[question.image]], *cell) == NAMES[question.right]


def test_a_caption_lists_the_classes_of_the_photo(masks, records):
    for record in records["captions"]:
        (_, caption) = pairs(record)[0]
        listed = set(re.findall(r"\w+", caption)) - {"A", "picture", "with", "and"}
        values = {value for row in masks[record["image"]] for value in row} - {UNKNOWN}
        assert listed == {NAMES[value] for value in values}


def test_records_are_not_replaced_by_others(data, tmp_path):
    words = ["questions", str(data), "--out", str(tmp_path)]
    main(words)
    main(words)
    before = (tmp_path / "questions.json").read_bytes()
    with pytest.raises(SystemExit, match="has records of other photos or options"):
        main([*words, "--seed", "1"])
    assert (tmp_path / "questions.json").read_bytes() == before
