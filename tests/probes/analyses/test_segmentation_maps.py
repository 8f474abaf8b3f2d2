"""Maps block the tokens that the run's knockout blocked, in the same layers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from probes import Knockout
from probes.analyses import run as run_analysis
from probes.analyses.knockout import KnockoutOptions, confused_classes
from probes.analyses.knockout.cases import PatchReader, find_cases
from probes.analyses.maps import describe, knockout_options
from probes.cli import main
from probes.runs.read import ProbeRun

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
    run_analysis(plan)
    reader = PatchReader(run)
    tokens = {}
    classes = run.metrics["classes"]
    for image, sample in enumerate(run.dataset()):
        truth = reader.mllm.geometry.patches(sample["target"]).view(1, -1)
        pixels = reader.mllm.preprocess([sample["image"]])
        predicted = reader.predict(reader.mllm.states(pixels, run.layers))
        layer = run.layers.index(plan.block_by)
        for case in find_cases(
            predicted,
            truth,
            [image],
            classes.index(name),
            layer,
        ):
            tokens[image] = case.blocked
    return run, plan, tokens


def test_maps_are_those_of_the_runs_knockout(blocked):
    run, plan, tokens = blocked
    assert knockout_options(run) == plan
    main(["maps", "--probes", str(run.path), "--image", "0", "--classes", *plan.classes])
    (entry,) = json.loads((run.path / "maps.json").read_text())["knockout"]
    assert entry["how"] == describe(plan)
    assert bool(describe(plan)) == (plan != KnockoutOptions(probes=run.path, classes=plan.classes))
    maps = load_file(run.path / "maps.safetensors")[f"knockout/{plan.classes[0]}"]
    image = run.dataset()[entry["image"]]["image"]
    for i, condition in enumerate(("incorrect", "correct"), 1):
        knockout = Knockout(tokens[entry["image"]][condition][None], plan.layers)
        expected = run.predict_sites(image, run.layers, knockout)
        assert torch.equal(maps[i], torch.from_numpy(expected)), condition
