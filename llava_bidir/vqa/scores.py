"""The benchmarks of Table 1, and their scores: on the dataset, resampled, and with two models' answers exchanged.

A score is a ratio of sums over units. A unit is drawn and exchanged as a whole: an image with all its questions, or a
question with all orders of its options. Shapes: R resamplings, U units.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from llava_bidir.common.bootstrap import RESAMPLINGS, bootstrap_weights, p_values, random_swaps

Item = dict[str, Any]  # as `harness.to_item` writes it


class ScoreTerms(NamedTuple):
    """Terms f[2, U] of a score, numerators and denominators, and strata i64[U], within which units are resampled."""

    terms: np.ndarray
    strata: np.ndarray

    def score(self) -> float:
        """Return the score on the dataset."""
        return ratio(self.terms.sum(1)).item()

    def resampled_scores(self, resamplings: int = RESAMPLINGS) -> torch.Tensor:
        """Return scores f[R]. Two models with the same units are resampled together."""
        weights = np.empty((len(self.strata), resamplings))
        sizes = np.bincount(self.strata)
        for stratum, size in enumerate(sizes.tolist()):
            drawn = bootstrap_weights(size, resamplings, seed=stratum)
            weights[self.strata == stratum] = drawn.T
        scores = ratio(self.terms @ weights)
        return torch.from_numpy(scores)


def swap_test(a: ScoreTerms, b: ScoreTerms, swaps: int = 10_000) -> float:
    """Return the two-sided p-value of equal scores: the models' answers are exchanged, unit by unit, at random."""
    is_swapped = random_swaps(len(a.strata), swaps)
    moved = (b.terms - a.terms) @ is_swapped.double().numpy().T
    sum_a = a.terms.sum(1, keepdims=True)
    sum_b = b.terms.sum(1, keepdims=True)
    score_a = ratio(sum_a + moved)
    score_b = ratio(sum_b - moved)
    differences = torch.from_numpy(score_b - score_a)
    p_value, _ = p_values(differences[:, None])
    return p_value.item()


def ratio(terms: np.ndarray) -> np.ndarray:
    """Return numerators / denominators f[...] of f[2, ...]. 0 / 0 counts as 0, as in F1 without any positive."""
    numerators, denominators = terms
    never_zero = np.where(denominators == 0, np.inf, denominators)
    return numerators / never_zero


def accuracy(unit: list[Item]) -> tuple[float, float]:
    """Return the number of correct items and of all."""
    right = sum(item["right"] for item in unit)
    return right, len(unit)


def circular(unit: list[Item]) -> tuple[float, float]:
    """Return 1 if all orders of a question's options are answered correctly (MMBench's CircularEval), else 0; and 1."""
    is_right = all(item["right"] for item in unit)
    return is_right, 1


def mme_points(unit: list[Item]) -> tuple[float, float]:
    """Return an image's 100 * (accuracy + whether both items are correct), and 1."""
    right, count = accuracy(unit)
    are_all_right = right == count
    return 100 * (right / count + are_all_right), 1


def f1(unit: list[Item]) -> tuple[float, float]:
    """Return the terms of the F1 of "yes". Other answers than yes and no are left out, as in lmms-eval's pope."""
    pairs = Counter()
    for item in unit:
        answer = item["answer"].strip().lower()
        target = item["target"].strip().lower()
        pairs[answer, target] += 1
    hits = 2 * pairs["yes", "yes"]
    misses = pairs["yes", "no"] + pairs["no", "yes"]
    return hits, hits + misses


class Column(NamedTuple):
    """A column of Table 1.

    Args:
        metric: Name of the metric in lmms-eval.
        count: Function from the items of a unit to the numerator and denominator of the score.
        categories: Categories whose scores are summed to points; else the score is a fraction.
    """

    metric: str
    count: Callable[[list[Item]], tuple[float, float]] = accuracy
    categories: str = ""

    def terms(self, items: list[Item]) -> ScoreTerms:
        """Return the terms of the score of items; each category has the weight of its mean."""
        categories = self.categories.split()
        units = defaultdict(list)
        for item in items:
            group = str(item["group"])
            if not categories or group in categories:
                units[group, item["unit"]].append(item)
        groups = [group for group, _ in units]
        _, strata = np.unique(groups, return_inverse=True)
        counts = [self.count(unit) for unit in units.values()]
        terms = np.array(counts, float).T
        sizes = np.bincount(strata)
        terms[0] *= len(units) / sizes[strata]
        return ScoreTerms(terms, strata)


class Benchmark(NamedTuple):
    """A task of lmms-eval: its name, columns by title, the key of a record's unit, and changed settings."""

    task: str
    columns: dict[str, Column]
    unit: str = ""  # each item alone
    overrides: Mapping[str, Any] = {}


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR"
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning"
MME = {
    "MME-P": Column("mme_perception_score", mme_points, PERCEPTION),
    "MME-C": Column("mme_cognition_score", mme_points, COGNITION),
}
# The paper does not name the measure. Its number is compared with accuracy; LLaVA-1.5 reports F1.
POPE = {"POPE": Column("pope_accuracy"), "POPE F1": Column("pope_f1_score", f1)}
MMBENCH = {"MMBench": Column("gpt_eval_score", circular)}
EXACT = Column("exact_match")
PROMPT = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
WITH_OCR = {"lmms_eval_specific_kwargs": {"default": PROMPT | {"ocr": True}}}
BENCHMARKS: dict[str, Benchmark] = {
    "gqa": Benchmark("gqa", {"GQA": EXACT}, "imageId"),
    # parses letters by rule; the task without _static asks GPT or guesses
    "mmbench": Benchmark("mmbench_en_dev_static", MMBENCH, "index"),
    "mme": Benchmark("mme", MME, "question_id"),
    "mmmu": Benchmark("mmmu_val", {"MMMU": Column("mmmu_acc")}, "id"),
    "pope": Benchmark("pope", POPE, "image_source"),
    "scienceqa": Benchmark("scienceqa_img", {"SQA-I": EXACT}),
    "textvqa": Benchmark("textvqa_val", {"TextVQA": EXACT}, "image_id"),
    # the prompt of LLaVA-1.5, with the OCR tokens of the dataset
    "textvqa_ocr": Benchmark(
        task="textvqa_val", columns={"TextVQA OCR": EXACT}, unit="image_id", overrides=WITH_OCR
    ),
    "vizwiz": Benchmark("vizwiz_vqa_val", {"VizWiz": EXACT}, "question_id"),
}
