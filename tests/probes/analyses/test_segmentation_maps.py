"""Maps block the tokens that the run's knockout blocked, in the same layers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from probes.analyses import run as run_analysis
from probes.analyses.knockout import KnockoutOptions, confused_classes
from probes.analyses.knockout.cases import PatchReader, find_cases
from probes.cli import main
from probes.models.knockout import knockout_of
from probes.runs.read import ProbeRun

PLANS = {"paper": {}, "layer and site of the predictions": {"layers": (2,), "block_by": "layer_02"}}


@pytest.mark.parametrize("name", PLANS)
def test_maps_are_those_of_the_runs_knockout(name, runs, tmp_path):
    run = ProbeRun(shutil.copytree(runs["bidirectional"].path, tmp_path / "run"))
    (wrong,) = confused_classes(run, 1)
    plan = KnockoutOptions(probes=run.path, classes=(wrong,), **PLANS[name])
    run_analysis(plan)
    results = json.loads((run.path / "knockout.json").read_text())
    results["options"]["min_patches"] = (
        99  # alone, an image can have fewer than in its batch, by rounding
    )
    (run.path / "knockout.json").write_text(json.dumps(results))
    main(["maps", "--probes", str(run.path), "--image", "0", "--classes", wrong])
    (entry,) = json.loads((run.path / "maps.json").read_text())["knockout"]
    assert (entry["layers"], entry["block_by"]) == (plan.layers and [*plan.layers], plan.block_by)
    sample = run.dataset()[entry["image"]]
    reader = PatchReader(run)
    mllm = reader.mllm
    predicted = reader.predict(mllm.states(mllm.preprocess([sample["image"]]), run.layers))
    truth = mllm.geometry.patches(sample["target"]).view(1, -1)
    number = run.metrics["classes"].index(wrong)
    (case,) = find_cases(
        predicted,
        truth=truth,
        index=[0],
        wrong_class=number,
        block_layer=run.layers.index(plan.block_by),
    )
    maps = load_file(run.path / "maps.safetensors")[f"knockout/{wrong}"]
    for i, condition in enumerate(("incorrect", "correct"), 1):
        knockout = knockout_of(case.blocked[condition][None], plan.layers)
        expected = run.predict_sites(sample["image"], run.layers, knockout)
        assert torch.equal(maps[i], torch.from_numpy(expected)), condition
