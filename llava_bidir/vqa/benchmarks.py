"""The benchmarks of Table 1: the task of lmms-eval, the columns and the expected answers of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .parsed_answers import (
    begins_with_yes_or_no,
    is_option_letter,
    is_phrase,
    is_readable,
    is_yes_or_no,
)
from .scores import (
    Item,
    ScoreTerms,
    accuracy_terms,
    circular_terms,
    f1_of_all_terms,
    f1_terms,
    mme_terms,
    yes_ratio_terms,
)

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


class Column(NamedTuple):
    """A column of Table 1.

    Args:
        metric: Name of the metric in the harness, None for a column that describes one. Such a column is not tested.
        terms: Function from items to the terms of the score.
        scale: Value of the harness for a score of 1.
        paper: Name in paper.json, None if the paper has no such column.
        points: True if the score is read as points, False for percent.
    """

    metric: str | None
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
        is_parsed: Returns True for an item whose answer the harness can read.
        unparsed: Says what the other answers are and what the harness does with them.
    """

    task: str
    columns: dict[str, Column]
    unit_of: Callable[[dict], Any]
    official_items: int | None = None
    group_key: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    is_parsed: Callable[[Item], bool] = is_phrase
    unparsed: str = "are empty or sentences and count as wrong, whatever they say"


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
        is_parsed=is_readable,
        unparsed="name no option; lmms-eval reads a capital letter of a word as one, else they count as wrong",
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
        is_parsed=begins_with_yes_or_no,
        unparsed="begin with neither yes nor no and count as wrong",
    ),
    "mmmu": Benchmark(
        "mmmu_val",
        {"MMMU": Column("mmmu_acc", paper="MMMU")},
        lambda r: r["id"],
        900,
        is_parsed=is_readable,
        unparsed="name no option; lmms-eval draws one at random",
    ),
    # The paper does not name the measure. Its number is compared with accuracy; LLaVA-1.5 reports F1.
    "pope": Benchmark(
        "pope",
        {
            "POPE": Column("pope_accuracy", paper="POPE"),
            "POPE F1": Column("pope_f1_score", f1_terms),
            "POPE F1 all": Column(None, f1_of_all_terms),
            "POPE yes": Column(None, yes_ratio_terms),
        },
        lambda r: r["image_source"],
        9000,
        is_parsed=is_yes_or_no,
        unparsed="are neither yes nor no, count as wrong and are left out of POPE F1, but not of POPE F1 all",
    ),
    "scienceqa": Benchmark(
        "scienceqa_img",
        {"SQA-I": Column("exact_match", paper="SQA_I")},
        lambda r: None,
        2017,
        is_parsed=is_option_letter,
        unparsed="do not begin with an option's letter and count as wrong",
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
        is_parsed=is_readable,
        unparsed="are empty and count as wrong",
    ),
}
TABLE1 = [name for name in BENCHMARKS if name != "toy"]
