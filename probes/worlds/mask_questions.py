"""Questions about photos whose answers follow from their masks.

    Is there any car in the picture?                        yes
    Which is left of the car: tree or road?                 tree
    Which is in row 2, column 3: car or building?           car

A question is always asked about two photos in which different answers are right. Without the photo, exactly half of the
answers can therefore be right, whatever the classes' frequencies are.

Places are cells of a grid over the photo. A cell has the class of more than half of its pixels, or none.

Shapes: H W pixels, G cells per row and column, K classes.
"""

from collections import Counter, defaultdict
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy import ndarray

KINDS = ("there", "left", "place")
HELD_OUT = 200  # questions about each data set
# share of the pixels from which a class counts as seen; one with fewer pixels, but some, is not asked for
LEAST_SEEN = 0.003
HALF = 0.5

Cells = list[list[str | None]]  # class of each cell, in rows
Key = tuple[str, str]  # kind of a question, and what it is about
Turn = dict[str, str]


class Fact(NamedTuple):
    """What is true of a photo.

    Args:
        answer: Class, "yes" or "no".
        box: Left, top, right and bottom of the cell that shows the answer, in fractions; None: no single place.
    """

    answer: str
    box: tuple[float, float, float, float] | None = None


Facts = dict[Key, Fact]  # of a photo


class MaskQuestion(NamedTuple):
    """A question about a photo."""

    text: str
    answer: str
    region: dict | None  # {"box", "class"}, as `probes routes` reads it


def find_facts(mask: ndarray, classes: list[str], grid: int) -> Facts:
    """Return what can be asked about a photo.

    Args:
        mask: Class indices uint8[H, W]; others than 0 to K - 1 are no class.
        classes: Their names.
        grid: G.
    """
    facts = {}
    for name, answer in _find_seen(mask, classes).items():
        facts["there", name] = Fact(answer)
    cells = find_cells(mask, classes, grid)
    for name, neighbour in _find_left(cells).items():
        box = _box(neighbour.row, neighbour.column, grid)
        facts["left", name] = Fact(neighbour.name, box)
    for row, names in enumerate(cells):
        for column, name in enumerate(names):
            if name is None:
                continue
            about = f"row {row + 1}, column {column + 1}"
            box = _box(row, column, grid)
            facts["place", about] = Fact(name, box)
    return facts


def find_cells(mask: ndarray, classes: list[str], grid: int) -> Cells:
    """Return the class of more than half of the pixels of each cell, None if there is none."""
    height, width = mask.shape
    rows = _cell_edges(height, grid)
    columns = _cell_edges(width, grid)
    cells: Cells = []
    for top, bottom in pairwise(rows):
        names = []
        for left, right in pairwise(columns):
            cell = mask[top:bottom, left:right]
            names.append(_main_class(cell, classes))
        cells.append(names)
    return cells


def _cell_edges(side: int, grid: int) -> list[int]:
    """Return where the cells of a side begin and end, in pixels, G + 1 numbers."""
    edges = np.linspace(0, side, grid + 1)
    return edges.round().astype(int).tolist()


def _main_class(cell: ndarray, classes: list[str]) -> str | None:
    """Return the class of more than half of the pixels; None if there is none."""
    counts = _count_pixels(cell, classes)
    most = int(counts.argmax())
    is_main = counts[most] > HALF * cell.size
    return classes[most] if is_main else None


def _count_pixels(mask: ndarray, classes: list[str]) -> ndarray:
    """Return the pixels i64[K] of each class; others are not counted."""
    counts = np.bincount(mask.ravel(), minlength=len(classes))
    return counts[: len(classes)]


def _box(row: int, column: int, grid: int) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a cell as fractions of the photo."""
    left = column / grid
    top = row / grid
    right = (column + 1) / grid
    bottom = (row + 1) / grid
    return left, top, right, bottom


def _find_seen(mask: ndarray, classes: list[str]) -> dict[str, str]:
    """Return "yes" or "no" by class; classes of a few pixels are left out."""
    shares = _count_pixels(mask, classes) / mask.size
    seen = {}
    for name, share in zip(classes, shares, strict=True):
        if share >= LEAST_SEEN:
            seen[name] = "yes"
        elif share == 0:
            seen[name] = "no"
    return seen


class _Neighbour(NamedTuple):
    """A cell to the left of a cell of another class."""

    name: str
    row: int
    column: int


def _find_left(cells: Cells) -> dict[str, _Neighbour]:
    """Return, by class, the first of the cells that show what more than half of the cells left of its own show.

    Only cells of another class count, and only one step to the left.
    """
    neighbours = defaultdict(list)
    for row, names in enumerate(cells):
        for column, (left, name) in enumerate(pairwise(names)):
            if name is None or left is None or left == name:
                continue
            neighbours[name].append(_Neighbour(left, row, column))
    found = {}
    for name, of_name in neighbours.items():
        counts = Counter(neighbour.name for neighbour in of_name)
        answer = max(counts, key=counts.get)
        if counts[answer] > HALF * len(of_name):
            showing = [neighbour for neighbour in of_name if neighbour.name == answer]
            found[name] = showing[0]
    return found


def ask_in_pairs(
    photos: list[Facts],
    pairs: int,
    rng: np.random.Generator,
) -> list[list[MaskQuestion]]:
    """Return questions about each photo; each text is asked of two photos with different answers.

    Args:
        photos: What is true of each photo, see :func:`find_facts`.
        pairs: Pairs of questions, as many of each kind; a kind that allows fewer leaves them to those after it.
        rng: Random generator.
    """
    asked: list[list[MaskQuestion]] = [[] for _ in photos]
    for number, kind in enumerate(KINDS):
        kinds_left = len(KINDS) - number
        drawn = _draw_pairs(
            photos,
            kind,
            pairs // kinds_left,
            rng,
        )
        pairs -= len(drawn)
        for pair in drawn:
            for photo, question in pair.items():
                asked[photo].append(question)
    shuffled = []
    for questions in asked:
        order = rng.permutation(len(questions))
        shuffled.append([questions[i] for i in order])
    return shuffled


def _draw_pairs(
    photos: list[Facts],
    kind: str,
    most: int,
    rng: np.random.Generator,
) -> list[dict[int, MaskQuestion]]:
    """Return up to `most` pairs of questions of a kind by photo; photos with the fewest questions come first."""
    # photos that can still be asked, by what the question is about and by their answer
    left: dict[Key, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for photo, facts in enumerate(photos):
        for key, fact in facts.items():
            kind_of_fact, _ = key
            if kind_of_fact == kind:
                left[key][fact.answer].append(photo)
    counts = np.zeros(len(photos), int)
    pairs: list[dict[int, MaskQuestion]] = []
    while len(pairs) < most:
        keys = [key for key, by_answer in left.items() if len(by_answer) > 1]
        if not keys:
            break
        key = keys[rng.integers(len(keys))]
        by_answer = left[key]
        possible = sorted(by_answer)
        order = rng.permutation(len(possible))
        answers = [possible[i] for i in order[:2]]
        pair = {}
        for answer in answers:
            candidates = by_answer[answer]
            asked = counts[candidates]
            fewest = asked == asked.min()
            photo = int(rng.choice(np.array(candidates)[fewest]))
            candidates.remove(photo)
            if not candidates:
                del by_answer[answer]
            counts[photo] += 1
            fact = photos[photo][key]
            pair[photo] = _build_question(key, fact, answers)
        pairs.append(pair)
    return pairs


def _build_question(key: Key, fact: Fact, choice: list[str]) -> MaskQuestion:
    """Return the question about a fact, with two answers to choose from."""
    kind, about = key
    one, other = choice
    texts = {
        "there": f"Is there any {about} in the picture?",
        "left": f"Which is left of the {about}: {one} or {other}?",
        "place": f"Which is in {about}: {one} or {other}?",
    }
    region = None
    if fact.box is not None:
        region = {"box": list(fact.box), "class": fact.answer}
    return MaskQuestion(texts[kind], fact.answer, region)


def to_turns(questions: list[tuple[str, str]]) -> list[Turn]:
    """Return questions and answers about a photo as the turns of LLaVA's JSON."""
    turns = []
    for text, answer in questions:
        turns.append({"from": "human", "value": text})
        turns.append({"from": "gpt", "value": answer})
    first = turns[0]
    first["value"] = f"<image>\n{first['value']}"
    return turns
