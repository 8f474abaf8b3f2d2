"""Results as `llava-bidir vqa` leaves them, made up: for checks and tables without a harness."""

from pathlib import Path

import numpy as np

from llava_bidir.vqa.benchmarks import BENCHMARKS
from llava_bidir.vqa.result_files import pins, write_results

ANSWERS = {"mmbench": "AB", "mme": ("Yes", "No"), "pope": ("yes", "no"), "scienceqa": "AB"}  # else: words


def write(out: Path, name: str, right: np.ndarray, mask: str = "causal", encoder: str = "clip", **facts) -> Path:
    """A finished task of two questions a unit; the target is the first answer there is, or else the other one."""
    columns, answers = BENCHMARKS[name].columns, ANSWERS.get(name, ("sky", "wall"))
    categories = ("existence", "code_reasoning")
    items = []
    for i, r in enumerate(right):
        target = answers[i % 2]
        items.append(
            {
                **{"item": i, "unit": i // 2, "group": categories[i // 2 % 2] if name == "mme" else None},
                **{"question": f"question {i}", "target": target, "right": float(r)},
                "answer": target if r else answers[1 - i % 2],
            }
        )
    out.mkdir(parents=True, exist_ok=True)
    written = {
        **{"benchmark": name, "model": f"{encoder}-{mask}", "encoder": encoder, "image_attention": mask},
        **{"fingerprint": f"{encoder}{mask}", "documents": len(items), "versions": pins(), "data": "here"},
        "harness": {title: column.parts(items).score() for title, column in columns.items()},
    }
    write_results(out, name, written | facts, items)
    return out
