"""Probes at the encoder's own layers of an MLLM: solved and trained beside the other sites."""

import pytest
import solving
import torch
from safetensors.torch import load_file

from probes.cli import main
from probes.runs.read import ProbeRun

SITES = ["encoder_00", "encoder_01", "encoder_02", "encoder"]


def test_the_layer_that_the_adapter_reads_has_the_probe_of_its_input(
    checkpoints,
    segmentation,
    tmp_path,
):
    command = solving.arguments(checkpoints["causal"], segmentation, tmp_path)
    main([*command, "--model.sites", f"[{', '.join(SITES)}]"])
    solved = ProbeRun(tmp_path)
    assert solved.sites == SITES
    probes = solved.probes()
    twin = SITES[:3][solved.mllm().model.config.vision_feature_layer]
    torch.testing.assert_close(probes[twin].head.weight, probes["encoder"].head.weight)
    scores = {entry["site"]: entry["miou"] for entry in solved.metrics["sites"]}
    assert scores[twin] == pytest.approx(scores["encoder"])


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
