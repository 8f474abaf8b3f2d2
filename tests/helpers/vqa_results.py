"""Synthetic results of `llava-bidir vqa`, for tests without a harness."""

import json
from pathlib import Path

import numpy as np

from llava_bidir.common.atomic_io import write_files

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
    **info,
) -> Path:
    """Write a finished task with two questions per unit, whose targets alternate between two words.

    Args:
        out: Folder of the results.
        name: Name of the benchmark.
        right: bool[items], the correctness of each item.
        mask: Image attention of the model.
        encoder: Name of the model's encoder.
        info: More settings of the task.
    """
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
        answer = words[i % 2 if r else 1 - i % 2]
        items.append(item | {"answer": answer, "right": float(r)})
    about = {
        "model": f"{encoder}-{mask}",
        "encoder": encoder,
        "image_attention": mask,
        "fingerprint": f"{encoder}{mask}",
        "dtype": "torch.float32",
    }
    lines = "".join(json.dumps(item) + "\n" for item in items)
    write_files({out / f"{name}.jsonl": lines, out / f"{name}.json": about | info})
    return out
