"""The benchmarks of Table 1: which task of lmms-eval each is, and how its score follows from its items.

The harness gives one number a task. For intervals and paired tests the same number is made here again from the items,
as a sum of ratios over *units*, which are what is drawn at random: an image with all its questions, or a question with
all orders of its options. check.py holds both against each other.

An item is a dict: {"item": its index in the data, "unit", "group": MME's category or None, "question", "answer",
"target", "right": 0..1}. Shapes: U units, G groups.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Item = dict[str, Any]

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


class Parts(NamedTuple):
    """A score in parts: sum over g of sum_u num[u, g] / sum_u den[u, g].

    num, den: f[U, G]; units: names of the U; strata: i64[U], a unit is only drawn in place of one of its stratum.
    """

    num: np.ndarray
    den: np.ndarray
    units: list
    strata: np.ndarray

    def score(self) -> float:
        return float(ratios(self.num.sum(0), self.den.sum(0)))


def ratios(num: np.ndarray, den: np.ndarray) -> np.ndarray:
    """Sum over the last axis of num / den; 0 / 0 counts as 0, as F1 does without any yes."""
    return np.divide(num, den, out=np.zeros_like(num, dtype=float), where=den != 0).sum(-1)


def by_unit(items: Iterable[Item]) -> dict[Any, list[Item]]:
    units = {}
    for item in items:
        units.setdefault((item["group"], item["unit"]), []).append(item)
    return units


def mean(items: list[Item]) -> Parts:
    """The share of right items."""
    return _parts(items, lambda unit: (sum(i["right"] for i in unit), len(unit)))


def circular(items: list[Item]) -> Parts:
    """A question counts if every order of its options is answered right (MMBench's CircularEval)."""
    return _parts(items, lambda unit: (all(i["right"] for i in unit), 1))


def f1(items: list[Item]) -> Parts:
    """F1 of "yes", an answer of neither yes nor no being neither a positive nor a negative, as in lmms-eval's pope."""

    def counts(unit):
        pairs = [(i["answer"].strip().lower(), i["target"].strip().lower()) for i in unit]
        hits, wrong = pairs.count(("yes", "yes")), pairs.count(("yes", "no")) + pairs.count(("no", "yes"))
        return 2 * hits, 2 * hits + wrong

    return _parts(items, counts)


def mme(categories: list[str]) -> Callable[[list[Item]], Parts]:
    """Sum over categories of 100 * (accuracy + share of images with both questions right)."""

    def parts(items: list[Item]) -> Parts:
        units = {key: unit for key, unit in by_unit(items).items() if key[0] in categories}
        found = sorted({category for category, _ in units})
        num, den = np.zeros((2, len(units), len(found)))
        for row, ((category, _), unit) in enumerate(units.items()):
            right, column = [i["right"] for i in unit], found.index(category)
            num[row, column] = 100 * (sum(right) / len(right) + all(right))
            den[row, column] = 1
        return Parts(num, den, list(units), np.array([found.index(category) for category, _ in units]))

    return parts


def _parts(items: list[Item], counts: Callable[[list[Item]], tuple[float, float]]) -> Parts:
    units = by_unit(items)
    num, den = np.array([counts(unit) for unit in units.values()], float).T
    return Parts(num[:, None], den[:, None], list(units), np.zeros(len(units), int))


class Column(NamedTuple):
    """A column of Table 1.

    Args:
        metric: What the harness calls it.
        parts: The score from the items.
        scale: The harness's number for a score of 1.
        paper: Its name in paper.json; None where the paper has no such column.
        points: Whether people read it as points rather than percent.
    """

    metric: str
    parts: Callable[[list[Item]], Parts] = mean
    scale: float = 1
    paper: str | None = None
    points: bool = False


def text(answer: str) -> bool:
    return bool(answer.strip())


def letter(answer: str) -> bool:
    return re.search(r"(?<![A-Za-z])[A-I](?![A-Za-z])", answer) is not None


def yes_or_no(answer: str) -> bool:
    return answer.strip().lower() in ("yes", "no")


def starts_with_yes_or_no(answer: str) -> bool:
    """As lmms-eval's mme reads answers."""
    head = answer.strip().lower().replace(".", "")[:4]
    return head in ("y", "n") or "yes" in head or "no" in head


@dataclass(frozen=True)
class Benchmark:
    """A task of lmms-eval.

    Args:
        task: Its name there.
        columns: The columns of Table 1 that it fills.
        unit: Of a record, what it shares with others; None stands for a unit of its own.
        items: How many the official split has; None if any number is right.
        usable: Whether an answer is of the kind that is asked for; an empty one never is.
        group: The field that names a category.
        changes: Of the task's configuration.
    """

    task: str
    columns: dict[str, Column]
    unit: Callable[[dict], Any]
    items: int | None = None
    usable: Callable[[str], bool] = text
    group: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)


SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
WITH_OCR = {"default": {"pre_prompt": "", "post_prompt": SHORT_ANSWER, "ocr": True}}

BENCHMARKS: dict[str, Benchmark] = {
    "gqa": Benchmark("gqa", {"GQA": Column("exact_match", paper="GQA")}, lambda r: r["imageId"], 12578),
    "mmbench": Benchmark(
        "mmbench_en_dev_static",  # letters are found by rule; the task without _static asks GPT, or guesses
        {"MMBench": Column("gpt_eval_score", circular, 100, "MMB")},
        lambda r: int(r["index"]) % 1_000_000,
        4329,
        letter,
    ),
    "mme": Benchmark(
        "mme",
        {
            "MME-P": Column("mme_perception_score", mme(PERCEPTION), 1, "MME_P", points=True),
            "MME-C": Column("mme_cognition_score", mme(COGNITION), 1, "MME_C", points=True),
        },
        lambda r: r["question_id"],
        2374,
        starts_with_yes_or_no,
        "category",
    ),
    "mmmu": Benchmark("mmmu_val", {"MMMU": Column("mmmu_acc", paper="MMMU")}, lambda r: r["id"], 900),
    # The paper says "POPE" only. Accuracy stands beside its number, F1 (LLaVA-1.5's own measure) beside that.
    "pope": Benchmark(
        "pope",
        {"POPE": Column("pope_accuracy", paper="POPE"), "POPE F1": Column("pope_f1_score", f1)},
        lambda r: r["image_source"],
        9000,
        yes_or_no,
    ),
    "scienceqa": Benchmark(
        "scienceqa_img", {"SQA-I": Column("exact_match", paper="SQA_I")}, lambda r: None, 2017, letter
    ),
    "textvqa": Benchmark(
        "textvqa_val", {"TextVQA": Column("exact_match", paper="TextVQA")}, lambda r: r["image_id"], 5000
    ),
    "textvqa_ocr": Benchmark(  # LLaVA-1.5's own prompt, with the data's OCR tokens
        "textvqa_val",
        {"TextVQA OCR": Column("exact_match")},
        lambda r: r["image_id"],
        5000,
        changes={"lmms_eval_specific_kwargs": WITH_OCR},
    ),
    "vizwiz": Benchmark(
        "vizwiz_vqa_val", {"VizWiz": Column("exact_match", paper="VizWiz")}, lambda r: r["question_id"], 4319
    ),
    "toy": Benchmark(  # the demo's questions: --data ASSETS
        "toy_questions",
        {"Toy": Column("exact_match")},
        lambda r: r["image"],
        changes={"dataset_kwargs": {"data_files": {"validation": "questions.json"}}},
    ),
}
TABLE1 = [name for name in BENCHMARKS if name != "toy"]
