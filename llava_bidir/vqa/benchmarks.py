"""The benchmarks of Table 1: the task of lmms-eval, the columns and the expected answers of each."""

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


@dataclass(frozen=True)
class Benchmark:
    """A task of lmms-eval.

    Args:
        task: Name of the task in the harness.
        columns: Columns of Table 1, by title.
        unit_of: Function from a record to its unit. None stands for a unit with one item.
        official_items: Number of items of the official split. None allows any number.
        group_key: Field of a record that names its category.
        overrides: Changes to the configuration of the task.
    """

    task: str
    columns: dict[str, Column]
    unit_of: Callable[[dict], Any]
    official_items: int | None = None
    group_key: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
WITH_OCR = {
    "default": {
        "pre_prompt": "",
        "post_prompt": SHORT_ANSWER,
        "ocr": True,
    }
}

BENCHMARKS: dict[str, Benchmark] = {
    "gqa": Benchmark(
        "gqa", {"GQA": Column("exact_match", paper="GQA")}, lambda r: r["imageId"], 12578
    ),
    "mmbench": Benchmark(
        # parses letters by rule; the task without _static asks GPT or guesses
        "mmbench_en_dev_static",
        {"MMBench": Column("gpt_eval_score", circular_terms, 100, "MMB")},
        lambda r: int(r["index"]) % 1_000_000,
        4329,
    ),
    "mme": Benchmark(
        "mme",
        {
            "MME-P": Column(
                "mme_perception_score",
                mme_terms(PERCEPTION),
                1,
                "MME_P",
                points=True,
            ),
            "MME-C": Column(
                "mme_cognition_score",
                mme_terms(COGNITION),
                1,
                "MME_C",
                points=True,
            ),
        },
        lambda r: r["question_id"],
        2374,
        "category",
    ),
    "mmmu": Benchmark(
        "mmmu_val", {"MMMU": Column("mmmu_acc", paper="MMMU")}, lambda r: r["id"], 900
    ),
    # The paper does not name the measure. Its number is compared with accuracy; LLaVA-1.5 reports F1.
    "pope": Benchmark(
        "pope",
        {
            "POPE": Column("pope_accuracy", paper="POPE"),
            "POPE F1": Column("pope_f1_score", f1_terms),
        },
        lambda r: r["image_source"],
        9000,
    ),
    "scienceqa": Benchmark(
        "scienceqa_img", {"SQA-I": Column("exact_match", paper="SQA_I")}, lambda r: None, 2017
    ),
    "textvqa": Benchmark(
        "textvqa_val",
        {"TextVQA": Column("exact_match", paper="TextVQA")},
        lambda r: r["image_id"],
        5000,
    ),
    "textvqa_ocr": Benchmark(  # the prompt of LLaVA-1.5, with the OCR tokens of the dataset
        "textvqa_val",
        {"TextVQA OCR": Column("exact_match")},
        lambda r: r["image_id"],
        5000,
        overrides={"lmms_eval_specific_kwargs": WITH_OCR},
    ),
    "vizwiz": Benchmark(
        "vizwiz_vqa_val",
        {"VizWiz": Column("exact_match", paper="VizWiz")},
        lambda r: r["question_id"],
        4319,
    ),
    "toy": Benchmark(  # the questions of the demo: --data ASSETS
        "toy_questions",
        {"Toy": Column("exact_match")},
        lambda r: r["image"],
        overrides={"dataset_kwargs": {"data_files": {"validation": "questions.json"}}},
    ),
}
TABLE1 = [name for name in BENCHMARKS if name != "toy"]
