"""Probes at the encoder's own layers of an MLLM: solved and trained beside the other sites."""

import pytest
import solving
import torch
from safetensors.torch import load_file

from probes.cli import main
from probes.runs.read import ProbeRun

SITES = ["encoder_00", "encoder_01", "encoder_02", "encoder", "adapter"]
SITES += ["layer_01", "layer_02", "layer_03", "final_norm"]


@pytest.fixture(scope="module")
def solved(checkpoints, segmentation, tmp_path_factory) -> ProbeRun:
    out = tmp_path_factory.mktemp("solved") / "run"
    command = solving.arguments(checkpoints["causal"], segmentation, out)
    main([*command, "--model.sites", "all"])
    return ProbeRun(out)


def test_all_sites_are_solved_and_the_layer_that_the_adapter_reads_as_its_input(solved):
    assert solved.sites == SITES
    probes = solved.probes()
    read = solved.mllm().model.config.vision_feature_layer
    twin = SITES[:3][read]
    torch.testing.assert_close(probes[twin].head.weight, probes["encoder"].head.weight)
    scores = {entry["site"]: entry["miou"] for entry in solved.metrics["sites"]}
    assert scores[twin] == pytest.approx(scores["encoder"])
    assert solved.peak_layer.startswith("layer_"), "the best layer is one of the LLM"


@pytest.mark.parametrize(
    ("few", "more"), [("null", "all"), ("[attn_01]", "[value_01, attn_01, adapter]")]
)
def test_trained_probes_of_other_sites_do_not_depend_on_these(
    few,
    more,
    checkpoints,
    segmentation,
    tmp_path,
):
    """The initialisation of a probe depends on the number of its site. The second pair is of parts of a layer."""
    weights = []
    for name, sites in (("without", few), ("with", more)):
        command = ["fit", "-c", "configs/demo/probes.yaml", "--trainer.max_epochs", "-1"]
        command += ["--trainer.max_steps", "1", "--model.mllm", str(checkpoints["causal"])]
        command += ["--data.root", str(segmentation), "--model.sites", sites]
        main([*command, "--out", str(tmp_path / name)])
        weights.append(load_file(tmp_path / name / "probes.safetensors"))
    without, with_all = weights
    assert len(without) < len(with_all)
    for name, weight in without.items():
        torch.testing.assert_close(with_all[name], weight)
