"""The benchmarks of Table 1: the task of lmms-eval, the columns and the expected answers of each."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .scores import Item, ScoreTerms, accuracy_terms, circular_terms, f1_terms, mme_terms

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


class Column(NamedTuple):
    """A column of Table 1.

    Args:
        metric: Name of the metric in the harness.
        terms: Function from items to the terms of the score.
        scale: Value of the harness for a score of 1.
        paper: Name in paper.json, None if the paper has no such column.
        points: True if the score is read as points, False for percent.
    """

    metric: str
    terms: Callable[[list[Item]], ScoreTerms] = accuracy_terms
    scale: float = 1
    paper: str | None = None
    points: bool = False


def has_text(answer: str) -> bool:
    """Return True unless the answer is blank."""
    return bool(answer.strip())


def has_letter(answer: str) -> bool:
    """Return True if the answer holds a single letter from A to I."""
    return re.search(r"(?<![A-Za-z])[A-I](?![A-Za-z])", answer) is not None


def is_option_of_scienceqa(answer: str) -> bool:
    """Return True if lmms-eval's scienceqa reads the answer as an option: its letter alone, or "A." and more."""
    return re.fullmatch(r"[A-Ia-i]|[A-I]\..*", answer.strip(), re.DOTALL) is not None


def is_yes_or_no(answer: str) -> bool:
    """Return True for yes and no, in any case."""
    return answer.strip().lower() in ("yes", "no")


def starts_with_yes_or_no(answer: str) -> bool:
    """Return True if lmms-eval's mme reads the answer as yes or no."""
    head = answer.strip().lower().replace(".", "")[:4]
    return head in ("y", "n") or "yes" in head or "no" in head


@dataclass(frozen=True)
class Benchmark:
    """A task of lmms-eval.

    Args:
        task: Name of the task in the harness.
        columns: Columns of Table 1, by title.
        unit_of: Function from a record to its unit. None stands for a unit with one item.
        official_items: Number of items of the official split. None allows any number.
        is_valid: Function that returns True for answers of the requested form.
        group_key: Field of a record that names its category.
        overrides: Changes to the configuration of the task.
    """

    task: str
    columns: dict[str, Column]
    unit_of: Callable[[dict], Any]
    official_items: int | None = None
    is_valid: Callable[[str], bool] = has_text
    group_key: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
WITH_OCR = {"default": {"pre_prompt": "", "post_prompt": SHORT_ANSWER, "ocr": True}}

BENCHMARKS: dict[str, Benchmark] = {
    "gqa": Benchmark("gqa", {"GQA": Column("exact_match", paper="GQA")}, lambda r: r["imageId"], 12578),
    "mmbench": Benchmark(
        "mmbench_en_dev_static",  # parses letters by rule; the task without _static asks GPT or guesses
        {"MMBench": Column("gpt_eval_score", circular_terms, 100, "MMB")},
        lambda r: int(r["index"]) % 1_000_000,
        4329,
        has_letter,
    ),
    "mme": Benchmark(
        "mme",
        {
            "MME-P": Column("mme_perception_score", mme_terms(PERCEPTION), 1, "MME_P", points=True),
            "MME-C": Column("mme_cognition_score", mme_terms(COGNITION), 1, "MME_C", points=True),
        },
        lambda r: r["question_id"],
        2374,
        starts_with_yes_or_no,
        "category",
    ),
    "mmmu": Benchmark("mmmu_val", {"MMMU": Column("mmmu_acc", paper="MMMU")}, lambda r: r["id"], 900),
    # The paper does not name the measure. Its number is compared with accuracy; LLaVA-1.5 reports F1.
    "pope": Benchmark(
        "pope",
        {"POPE": Column("pope_accuracy", paper="POPE"), "POPE F1": Column("pope_f1_score", f1_terms)},
        lambda r: r["image_source"],
        9000,
        is_yes_or_no,
    ),
    "scienceqa": Benchmark(
        "scienceqa_img", {"SQA-I": Column("exact_match", paper="SQA_I")}, lambda r: None, 2017, is_option_of_scienceqa
    ),
    "textvqa": Benchmark(
        "textvqa_val", {"TextVQA": Column("exact_match", paper="TextVQA")}, lambda r: r["image_id"], 5000
    ),
    "textvqa_ocr": Benchmark(  # the prompt of LLaVA-1.5, with the OCR tokens of the dataset
        "textvqa_val",
        {"TextVQA OCR": Column("exact_match")},
        lambda r: r["image_id"],
        5000,
        overrides={"lmms_eval_specific_kwargs": WITH_OCR},
    ),
    "vizwiz": Benchmark(
        "vizwiz_vqa_val", {"VizWiz": Column("exact_match", paper="VizWiz")}, lambda r: r["question_id"], 4319
    ),
    "toy": Benchmark(  # the questions of the demo: --data ASSETS
        "toy_questions",
        {"Toy": Column("exact_match")},
        lambda r: r["image"],
        overrides={"dataset_kwargs": {"data_files": {"validation": "questions.json"}}},
    ),
}
TABLE1 = [name for name in BENCHMARKS if name != "toy"]
