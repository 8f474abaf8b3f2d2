"""Knockouts on disk, from random outcomes whose effects are known, without a model."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from probes.analyses.claims import write_effects
from probes.analyses.knockout import KnockoutOptions
from probes.analyses.knockout.cases import CONDITIONS, outcome_key
from probes.analyses.knockout.knockout_effects import knockout_effects, knockout_rows
from probes.runs.read import ProbeRun

# pairs that are mistaken for each other
CLASSES = ["sky", "ceiling", "road", "floor", "wall", "building"]
N = 40
L = 4
NOISE = 0.3


def write_knockout(run: ProbeRun, tensors: dict[str, torch.Tensor]) -> None:
    """Write a knockout and its effects into the folder of a run."""
    save_file(tensors, run.path / "knockout.safetensors")
    classes = [name for name in CLASSES if f"{name}/image" in tensors]
    effects = knockout_effects(run, tensors)
    options = KnockoutOptions(probes=run.path, classes=tuple(classes))
    results = {"runs": [run.fingerprint], "options": options.settings}
    results |= knockout_rows(run, options=options, tensors=tensors, effects=effects)
    (run.path / "knockout.json").write_text(json.dumps(results))
    write_effects(run, "knockout", effects)


def simulate(
    rng: np.random.Generator, effects: dict[str, np.ndarray], cases: int = N
) -> dict[str, torch.Tensor]:
    """Return a knockout of `cases` cases per class, in which `effects[class]` shifts incorrect and correct.

    The noise has a part that all classes share in an image.
    """
    tensors = {}
    shared = {condition: rng.normal(0, NOISE / 2, N) for condition in CONDITIONS}
    for name, shifts in effects.items():
        images = np.sort(rng.choice(N, cases, replace=False))
        tensors[f"{name}/image"] = torch.tensor(images)
        tensors[f"{name}/patches"] = torch.tensor(rng.integers(1, 4, cases))
        tensors[f"{name}/anchors"] = torch.ones(cases, dtype=torch.long)
        tensors[f"{name}/correct_class"] = torch.full((cases,), CLASSES.index(name) ^ 1)
        by_condition = dict(zip(("incorrect", "correct"), shifts, strict=True))
        for condition in CONDITIONS:
            mean = by_condition.get(condition, 0) + shared[condition][images, None]
            for outcome, sign in (("rate", 1), ("still_wrong", 0.5)):
                values = sign * (mean + rng.normal(0, NOISE, (cases, L + 1)))
                tensors[f"{name}/{outcome_key(outcome, condition)}"] = torch.tensor(values).float()
    return tensors
