"""`probes questions`: conversations about photos with masks, in LLaVA's JSON.

OUT/captions.json     the classes of each training photo as a sentence, for stage 1
OUT/dialogues.json    all questions about a training photo in one conversation, for stage 2
OUT/questions.json    one question about a validation photo per record, with "regions" for `probes routes`

DATA is a folder data set (probes/README.md, "Your own data"). The answers follow from its masks:

    Is there any car in the picture?                        yes
    Which is left of the car: tree or road?                 tree
    Which is in row 2, column 3: car or building?           car

A question is always asked about two photos in which different answers are right. Without the photo, exactly half of the
answers can therefore be right, whatever the classes' frequencies are.

Places are cells of a grid over the photo. A cell has the class of more than half of its pixels, or none.

Shapes: H W pixels, G cells per row and column, K classes.
"""

import json
from collections import Counter, defaultdict
from itertools import pairwise, product
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy import ndarray
from numpy.random import Generator

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import write_files
from probes.config import QuestionsOptions
from probes.data.folder import FolderDataset

from .dialogues import Turn, find_box, make_turns, prepend_picture

CAPTION = "Describe the picture."
KINDS = ("there", "left", "place")
# share of the pixels from which a class counts as seen; one with fewer pixels, but some, is not asked for
LEAST_SEEN = 0.003
HALF = 0.5

Place = tuple[int, int]  # row and column of a cell
Key = tuple[str, str]  # kind of a question, and what it is about


class Fact(NamedTuple):
    """What is true of a photo.

    Args:
        answer: Class, "yes" or "no".
        box: Left, top, right and bottom of the cell that shows the answer, in fractions; None: no single place.
    """

    answer: str
    box: list[float] | None = None


Facts = dict[Key, Fact]  # of a photo


AnswerRegion = TypedDict("AnswerRegion", {"box": list[float], "class": str})


class PictureRecord(TypedDict):
    """LLaVA's record of a photo; `probes routes` reads the regions."""

    id: str
    image: str
    conversations: list[Turn]
    regions: NotRequired[list[AnswerRegion | None]]  # of each question; None: no single place


class MaskQuestion(NamedTuple):
    """A question about a photo.

    Args:
        turns: The question and its answer.
        region: Where its answer is; None: no single place.
    """

    turns: list[Turn]
    region: AnswerRegion | None


def run(options: QuestionsOptions) -> None:
    """Run `probes questions`.

    Raises:
        UserError: OUT has other records already, or the photos give none.
    """
    by_name = build_records(options)
    files = {options.out / f"{name}.json": records for name, records in by_name.items()}
    for file, records in files.items():
        if file.is_file() and json.loads(file.read_text()) != records:
            raise UserError(
                f"{file} has records of other photos or options; choose another --out, or delete it"
            )
    write_files(files)
    counts = ", ".join(f"{len(records):,} {name}" for name, records in by_name.items())
    print(f"{options.out}: {counts}; train with --data.images {options.data}")


def build_records(options: QuestionsOptions, prefix: str = "") -> dict[str, list[PictureRecord]]:
    """Return LLaVA's records by file name, without suffix; `prefix` is put before the paths of images.

    Raises:
        UserError: The data are no folder data set, or its photos are too alike to be asked about.
    """
    rng = np.random.default_rng(options.seed)
    training = _read_facts(options, "training", prefix)
    validation = _read_facts(options, "validation", prefix)
    captions = []
    dialogues = []
    pairs = options.per_photo * len(training) // 2
    asked = ask_in_pairs([*training.values()], pairs, rng)
    for (photo, facts), questions_of_photo in zip(training.items(), asked, strict=True):
        caption = _caption(facts, rng)
        if caption is not None:
            captions.append(_record(photo, make_turns(CAPTION, caption)))
        turns = []
        for question in questions_of_photo:
            turns += question.turns
        if turns:
            dialogues.append(_record(photo, turns))
    questions = []
    asked = ask_in_pairs([*validation.values()], options.held_out // 2, rng)
    for photo, questions_of_photo in zip(validation, asked, strict=True):
        for question in questions_of_photo:
            record = _record(photo, question.turns)
            questions.append(record | {"regions": [question.region]})
    by_name = {"captions": captions, "dialogues": dialogues, "questions": questions}
    for name, records in by_name.items():
        if not records:
            raise UserError(
                f"{options.data}: its masks give no {name}; expected photos that show different classes"
            )
    return by_name


def _read_facts(options: QuestionsOptions, split: str, prefix: str) -> dict[str, Facts]:
    """Return what is true of each photo of a split, in the order of their names.

    Raises:
        UserError: The data are no folder data set, or a photo or its mask cannot be read.
    """
    dataset = FolderDataset(options.data, split)
    facts = {}
    for index in range(len(dataset)):
        file, _ = dataset.files[index]
        photo = prefix + file.relative_to(options.data).as_posix()
        mask = dataset[index]["target"]
        facts[photo] = find_facts(mask, dataset.classes, options.grid)
    return facts


def _record(photo: str, turns: list[Turn]) -> PictureRecord:
    return {"id": photo, "image": photo, "conversations": prepend_picture(turns)}


def _caption(facts: Facts, rng: Generator) -> str | None:
    """Return, e.g., "A picture with road, sky and car." in random order; None if no class is seen."""
    shown = []
    for (kind, name), fact in facts.items():
        if kind == "there" and fact.answer == "yes":
            shown.append(name)
    if not shown:
        return None
    *most, last = map(str, rng.permutation(shown))
    listed = last
    if most:
        listed = f"{', '.join(most)} and {last}"
    return f"A picture with {listed}."


def find_facts(mask: ndarray, classes: list[str], grid: int) -> Facts:
    """Return what can be asked about a photo.

    Args:
        mask: Class indices uint8[H, W]; others than 0 to K - 1 are no class.
        classes: Their names.
        grid: G.
    """
    facts = {}
    shares = _count_pixels(mask, classes) / mask.size
    for name, share in zip(classes, shares, strict=True):
        if share == 0:
            facts["there", name] = Fact("no")
        elif share >= LEAST_SEEN:
            facts["there", name] = Fact("yes")
    cells = _find_cells(mask, classes, grid)
    for name, places in _find_places_beside(cells).items():
        counts = Counter(cells[place] for place in places)
        answer = max(counts, key=counts.get)
        if counts[answer] > HALF * len(places):
            first = next(place for place in places if cells[place] == answer)
            facts["left", name] = Fact(answer, find_box(*first, grid))
    for (row, column), name in cells.items():
        about = f"row {row + 1}, column {column + 1}"
        facts["place", about] = Fact(name, find_box(row, column, grid))
    return facts


def _find_places_beside(cells: dict[Place, str]) -> dict[str, list[Place]]:
    """Return, by class, the cells to the left of those of the class that show another one."""
    beside = defaultdict(list)
    for (row, column), name in cells.items():
        place = (row, column - 1)
        if cells.get(place, name) != name:
            beside[name].append(place)
    return beside


def _find_cells(mask: ndarray, classes: list[str], grid: int) -> dict[Place, str]:
    """Return the class of more than half of the pixels of each cell that has one, in raster order."""
    height, width = mask.shape
    rows = _split_side(height, grid)
    columns = _split_side(width, grid)
    cells = {}
    for row, column in product(range(grid), repeat=2):
        cell = mask[rows[row], columns[column]]
        counts = _count_pixels(cell, classes)
        if counts.max() > HALF * cell.size:
            cells[row, column] = classes[counts.argmax()]
    return cells


def _split_side(side: int, grid: int) -> list[slice]:
    """Return the pixels of each row or column of cells, of a photo with so many pixels."""
    edges = np.linspace(0, side, grid + 1).round().astype(int)
    return [slice(start, end) for start, end in pairwise(edges)]


def _count_pixels(mask: ndarray, classes: list[str]) -> ndarray:
    """Return the pixels i64[K] of each class; others are not counted."""
    return np.bincount(mask.ravel(), minlength=len(classes))[: len(classes)]


def ask_in_pairs(photos: list[Facts], pairs: int, rng: Generator) -> list[list[MaskQuestion]]:
    """Return questions about each photo; each text is asked of two photos with different answers.

    Args:
        photos: What is true of each photo, see :func:`find_facts`.
        pairs: Pairs of questions, as many of each kind; a kind that allows fewer leaves them to those after it.
        rng: Random generator.
    """
    asked: list[list[MaskQuestion]] = [[] for _ in photos]
    for number, kind in enumerate(KINDS):
        kinds_left = len(KINDS) - number
        drawn = _draw_pairs(photos, kind=kind, most=pairs // kinds_left, rng=rng)
        pairs -= len(drawn)
        for pair in drawn:
            for photo, question in pair.items():
                asked[photo].append(question)
    return [[questions[i] for i in rng.permutation(len(questions))] for questions in asked]


def _draw_pairs(
    photos: list[Facts], kind: str, most: int, rng: Generator
) -> list[dict[int, MaskQuestion]]:
    """Return up to `most` pairs of questions of a kind by photo; photos with the fewest questions come first."""
    unasked = _photos_by_answer(photos, kind)
    counts = np.zeros(len(photos), int)
    pairs: list[dict[int, MaskQuestion]] = []
    while len(pairs) < most:
        keys = [key for key, by_answer in unasked.items() if len(by_answer) > 1]
        if not keys:
            break
        key = keys[rng.integers(len(keys))]
        by_answer = unasked[key]
        possible = sorted(by_answer)
        choice = [possible[i] for i in rng.permutation(len(possible))[:2]]
        pair = {}
        for answer in choice:
            candidates = by_answer[answer]
            asked = counts[candidates]
            least_asked = np.array(candidates)[asked == asked.min()]
            photo = int(rng.choice(least_asked))
            candidates.remove(photo)
            if not candidates:
                del by_answer[answer]
            counts[photo] += 1
            pair[photo] = _ask(key, photos[photo][key], choice)
        pairs.append(pair)
    return pairs


def _photos_by_answer(photos: list[Facts], kind: str) -> dict[Key, dict[str, list[int]]]:
    """Return the photos that questions of a kind can be asked of, by what they are about and by the answer."""
    by_key: dict[Key, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for photo, facts in enumerate(photos):
        for key, fact in facts.items():
            kind_of_fact, _ = key
            if kind_of_fact == kind:
                by_key[key][fact.answer].append(photo)
    return by_key


def _ask(key: Key, fact: Fact, choice: list[str]) -> MaskQuestion:
    """Return the question about a fact, with two answers to choose from."""
    kind, about = key
    one, other = choice
    texts = {
        "there": f"Is there any {about} in the picture?",
        "left": f"Which is left of the {about}: {one} or {other}?",
        "place": f"Which is in {about}: {one} or {other}?",
    }
    region = None
    if fact.box:
        region = {"box": fact.box, "class": fact.answer}
    return MaskQuestion(make_turns(texts[kind], fact.answer), region)
