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
    facts = {("there", name): Fact(answer) for name, answer in _find_seen(mask, classes).items()}
    cells = find_cells(mask, classes, grid)
    boxes = {(row, column): _box(row, column, grid) for row, column in np.ndindex(grid, grid)}
    for name, (answer, place) in _find_left(cells).items():
        facts["left", name] = Fact(answer, boxes[place])
    for (row, column), box in boxes.items():
        if (name := cells[row][column]) is not None:
            facts["place", f"row {row + 1}, column {column + 1}"] = Fact(name, box)
    return facts


def find_cells(mask: ndarray, classes: list[str], grid: int) -> Cells:
    """Return the class of more than half of the pixels of each cell, None if there is none."""
    rows, columns = (np.linspace(0, side, grid + 1).round().astype(int) for side in mask.shape)
    cells: Cells = []
    for top, bottom in zip(rows[:-1], rows[1:], strict=True):
        cells.append([])
        for left, right in zip(columns[:-1], columns[1:], strict=True):
            cell = mask[top:bottom, left:right]
            counts = np.bincount(cell.ravel(), minlength=len(classes))[: len(classes)]
            most = int(counts.argmax())
            found = counts[most] > HALF * cell.size
            cells[-1].append(classes[most] if found else None)
    return cells


def _box(row: int, column: int, grid: int) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a cell as fractions of the photo."""
    return column / grid, row / grid, (column + 1) / grid, (row + 1) / grid


def _find_seen(mask: ndarray, classes: list[str]) -> dict[str, str]:
    """Return "yes" or "no" by class; classes of a few pixels are left out."""
    shares = np.bincount(mask.ravel(), minlength=len(classes))[: len(classes)] / mask.size
    seen = {}
    for name, share in zip(classes, shares, strict=True):
        if share >= LEAST_SEEN:
            seen[name] = "yes"
        elif share == 0:
            seen[name] = "no"
    return seen


def _find_left(cells: Cells) -> dict[str, tuple[str, tuple[int, int]]]:
    """Return, by class, what more than half of the cells left of its own show, and the first of these cells.

    Only cells of another class count, and only one step to the left.
    """
    neighbours = defaultdict(list)
    for row, names in enumerate(cells):
        for column, (left, name) in enumerate(zip(names, names[1:], strict=False)):
            if name is not None and left not in (None, name):
                neighbours[name].append((left, (row, column)))
    found = {}
    for name, places in neighbours.items():
        answer, count = Counter(left for left, _ in places).most_common(1)[0]
        if count > HALF * len(places):
            found[name] = answer, next(place for left, place in places if left == answer)
    return found


def ask_in_pairs(
    photos: list[Facts], pairs: int, rng: np.random.Generator
) -> list[list[MaskQuestion]]:
    """Return questions about each photo; each text is asked of two photos with different answers.

    Args:
        photos: What is true of each photo, see :func:`find_facts`.
        pairs: Pairs of questions, as many of each kind; a kind that allows fewer leaves them to those after it.
        rng: Random generator.
    """
    asked: list[list[MaskQuestion]] = [[] for _ in photos]
    for number, kind in enumerate(KINDS):
        drawn = _draw_pairs(photos, kind, pairs // (len(KINDS) - number), rng)
        pairs -= len(drawn)
        for pair in drawn:
            for photo, question in pair.items():
                asked[photo].append(question)
    return [[questions[i] for i in rng.permutation(len(questions))] for questions in asked]


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
            if key[0] == kind:
                left[key][fact.answer].append(photo)
    counts = np.zeros(len(photos), int)
    pairs: list[dict[int, MaskQuestion]] = []
    while len(pairs) < most:
        keys = [key for key, by_answer in left.items() if len(by_answer) > 1]
        if not keys:
            break
        key = keys[rng.integers(len(keys))]
        by_answer = left[key]
        answers = [sorted(by_answer)[i] for i in rng.permutation(len(by_answer))[:2]]
        pair = {}
        for answer in answers:
            candidates = by_answer[answer]
            fewest = counts[candidates] == counts[candidates].min()
            photo = int(rng.choice(np.array(candidates)[fewest]))
            candidates.remove(photo)
            if not candidates:
                del by_answer[answer]
            counts[photo] += 1
            pair[photo] = _build_question(key, photos[photo][key], answers)
        pairs.append(pair)
    return pairs


def _build_question(key: Key, fact: Fact, choice: list[str]) -> MaskQuestion:
    kind, about = key
    one, other = choice
    texts = {
        "there": f"Is there any {about} in the picture?",
        "left": f"Which is left of the {about}: {one} or {other}?",
        "place": f"Which is in {about}: {one} or {other}?",
    }
    region = fact.box and {"box": list(fact.box), "class": fact.answer}
    return MaskQuestion(texts[kind], fact.answer, region)


def to_turns(questions: list[tuple[str, str]]) -> list[Turn]:
    """Return questions and answers about a photo as the turns of LLaVA's JSON."""
    turns = []
    for text, answer in questions:
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns
