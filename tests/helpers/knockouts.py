"""Knockouts on disk, from random outcomes whose effects are known, without a model."""

import json
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from probes.analyses.claims import write_effects
from probes.analyses.knockout import KnockoutOptions
from probes.analyses.knockout.cases import outcome_key
from probes.analyses.knockout.effects import knockout_effects, knockout_rows
from probes.runs.read import ProbeRun

CLASSES = ["sky", "ceiling", "road", "floor", "wall", "building"]
PARTNERS = {
    "sky": "ceiling",
    "ceiling": "sky",
    "road": "floor",
    "floor": "road",
    "wall": "building",
    "building": "wall",
}
CONDITIONS = ("none", "incorrect", "correct", "random_incorrect", "random_correct")
N = 40
L = 4


def write_knockout(run: ProbeRun, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write a knockout and its effects into the folder of a run, and return knockout.json."""
    save_file(
        {key: values.contiguous() for key, values in tensors.items()},
        run.path / "knockout.safetensors",
    )
    classes = [name for name in CLASSES if f"{name}/image" in tensors]
    effects = knockout_effects(run, tensors)
    options = KnockoutOptions(probes=run.path, classes=tuple(classes))
    results = {"runs": [run.fingerprint], "options": options.settings}
    results |= knockout_rows(run, options, tensors, effects)
    (run.path / "knockout.json").write_text(json.dumps(results))
    write_effects(run, "knockout", effects)
    return results


def simulate(
    rng: np.random.Generator,
    effects: dict[str, np.ndarray],
    conditions=CONDITIONS,
    cases: int = N,
    noise: float = 0.3,
) -> dict[str, torch.Tensor]:
    """Return a knockout of `cases` cases per class, in which `effects[class]` shifts incorrect and correct.

    The noise has a part that all classes share in an image.
    """
    tensors = {}
    shared = {condition: rng.normal(0, noise / 2, N) for condition in conditions}
    for name, (incorrect, correct) in effects.items():
        images = np.sort(rng.choice(N, cases, replace=False))
        tensors[f"{name}/image"] = torch.tensor(images)
        tensors[f"{name}/patches"] = torch.tensor(rng.integers(1, 4, cases))
        tensors[f"{name}/anchors"] = torch.ones(cases, dtype=torch.long)
        tensors[f"{name}/correct_class"] = torch.full((cases,), CLASSES.index(PARTNERS[name]))
        for condition in conditions:
            shift = {"incorrect": incorrect, "correct": correct}.get(condition, 0)
            for outcome, sign in (("rate", 1), ("still_wrong", 0.5)):
                values = (
                    shift + shared[condition][images, None] + rng.normal(0, noise, (cases, L + 1))
                )
                tensors[f"{name}/{outcome_key(outcome, condition)}"] = torch.tensor(
                    sign * values, dtype=torch.float32
                )
    return tensors
