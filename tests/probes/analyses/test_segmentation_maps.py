"""Maps block the tokens that the run's knockout blocked, in the same layers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from probes.analyses.knockout import KnockoutOptions
from probes.analyses.knockout.cases import PatchReader, confused_classes, find_cases
from probes.analyses.knockout.config import describe, options_of_run
from probes.analyses.knockout.run import knockout
from probes.analyses.maps.run import predict_maps
from probes.cli import main
from probes.runs.probe_run import ProbeRun
from probes.score.true_classes import true_classes

PLANS = {
    "paper": {},
    "layers": {"layers": (2,)},
    "site of the predictions": {"block_by": "layer_02"},
}


@pytest.fixture(params=PLANS)
def blocked(request, runs, tmp_path) -> tuple[ProbeRun, KnockoutOptions, dict]:
    """A copy of a run with a knockout, its plan, and the tokens that it blocks by image and condition."""
    run = ProbeRun(shutil.copytree(runs["bidirectional"].path, tmp_path / "run"))
    (name,) = confused_classes(run, 1)
    plan = KnockoutOptions(probes=run.path, classes=(name,), **PLANS[request.param])
    knockout(run, plan)
    reader = PatchReader(run)
    tokens = {}
    classes = run.metrics["classes"]
    for image, sample in enumerate(run.dataset()):
        truth = true_classes(torch.from_numpy(sample["target"])[None], 3, reader.mllm)
        predicted = reader.predict(reader.mllm.preprocess([sample["image"]]))
        layer = run.layers.index(plan.block_by)
        for case in find_cases(
            predicted,
            truth,
            torch.tensor([image]),
            classes.index(name),
            layer,
        ):
            tokens[image] = case.blocked
    return run, plan, tokens


def test_maps_are_those_of_the_runs_knockout(blocked):
    run, plan, tokens = blocked
    assert options_of_run(run) == plan
    main(["maps", "--probes", str(run.path), "--image", "0", "--classes", *plan.classes])
    (entry,) = json.loads((run.path / "maps.json").read_text())["knockout"]
    assert entry["how"] == describe(plan)
    assert bool(describe(plan)) == (plan != KnockoutOptions(probes=run.path, classes=plan.classes))
    maps = load_file(run.path / "maps.safetensors")[f"knockout/{plan.classes[0]}"]
    reader = PatchReader(run)
    sample = run.dataset()[entry["image"]]
    for i, condition in enumerate(("incorrect", "correct"), 1):
        expected = predict_maps(
            reader,
            sample,
            run.layers,
            tokens[entry["image"]][condition],
            plan.layers,
        )
        assert torch.equal(maps[i], expected), condition
