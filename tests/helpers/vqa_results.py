"""Synthetic results of `llava-bidir vqa`, for tests without a harness."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_bidir.vqa.benchmarks import BENCHMARKS
from llava_bidir.vqa.result_files import pinned_versions, write_results

ANSWERS = {
    "mmbench": "AB",
    "mme": ("Yes", "No"),
    "pope": ("yes", "no"),
    "scienceqa": "AB",
}  # others: words


def write(
    out: Path,
    name: str,
    right: np.ndarray,
    mask: str = "causal",
    encoder: str = "clip",
    answers: Sequence[str] | None = None,
    **info,
) -> Path:
    """Write a finished task with two questions per unit, whose targets alternate between two words.

    Args:
        out: Folder of the results.
        name: Name of the benchmark.
        right: bool[items], the correctness of each item.
        mask: Image attention of the model.
        encoder: Name of the model's encoder.
        answers: Answer of each item, by default one of the two words.
        info: More settings of the task.
    """
    columns = BENCHMARKS[name].columns
    words = ANSWERS.get(name, ("sky", "wall"))
    categories = ("existence", "code_reasoning")
    items = []
    for i, r in enumerate(right):
        group = categories[i // 2 % 2] if name == "mme" else None
        item = {
            "item": i,
            "unit": i // 2,
            "group": group,
            "question": f"question {i}",
            "target": words[i % 2],
        }
        answer = answers[i] if answers else words[i % 2 if r else 1 - i % 2]
        items.append(item | {"answer": answer, "right": float(r)})
    results = {
        "benchmark": name,
        "model": f"{encoder}-{mask}",
        "encoder": encoder,
        "image_attention": mask,
        "fingerprint": f"{encoder}{mask}",
        "documents": len(items),
        "versions": pinned_versions(),
        "data": "here",
        "harness": {
            title: column.terms(items).score() for title, column in columns.items() if column.metric
        },
    }
    write_results(out, name, results | info, items)
    return out
