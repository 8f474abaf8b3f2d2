"""Probes inside a layer and at the encoder's own layers: solved, saved by name, and read by the commands after it."""

import labs
import numpy as np
import pytest
import solving
import torch
from PIL import Image

from probes.cli import main
from probes.runs.read import ProbeRun

ENCODER = ["encoder_00", "encoder_01", "encoder_02"]
PARTS = ["value_02", "attn_02", "mlp_02"]
SITES = [*ENCODER, "encoder", "adapter", *PARTS, "layer_02"]


@pytest.fixture(scope="module")
def solved(checkpoints, segmentation, tmp_path_factory) -> ProbeRun:
    out = tmp_path_factory.mktemp("solved") / "run"
    more = ["--model.sites", f"[{', '.join(SITES)}]", "--save_predictions", "true"]
    main(solving.arguments(checkpoints["causal"], segmentation, out, *more))
    return ProbeRun(out)


def test_runs_have_these_sites_under_their_names(solved):
    assert solved.sites == SITES
    llm = solved.mllm().model.config.text_config
    values = llm.num_key_value_heads * llm.hidden_size // llm.num_attention_heads
    assert {entry["site"]: entry["dim"] for entry in solved.metrics["sites"]}["value_02"] == values
    assert solved.peak_layer == solved.metrics["summary"]["peak_site"] == "layer_02"


def test_the_layer_that_the_adapter_reads_has_the_probe_of_its_input(solved):
    probes = solved.probes()
    twin = ENCODER[solved.mllm().model.config.vision_feature_layer]
    torch.testing.assert_close(probes[twin].head.weight, probes["encoder"].head.weight)
    scores = {entry["site"]: entry["miou"] for entry in solved.metrics["sites"]}
    assert scores[twin] == pytest.approx(scores["encoder"])


def test_segment_and_predict_read_a_part(solved, segmentation, tmp_path):
    photo = next((segmentation / "images/validation").iterdir())
    words = ["--probes", str(solved.path), "--out", str(tmp_path), "--site", "attn_02"]
    main(["segment", str(photo), *words])
    mllm = solved.mllm()
    added = mllm.states(mllm.preprocess([photo]), ["attn_02"])["attn_02"].float()
    logits = solved.probes()["attn_02"](added).transpose(1, 2).unflatten(-1, mllm.grid)
    size = Image.open(photo).size[::-1]
    expected = torch.nn.functional.interpolate(logits, size, mode="bilinear")[0].argmax(0)
    for folder in (tmp_path, solved.path / "predictions/attn_02"):
        written = np.asarray(Image.open(folder / f"{photo.stem}.png"))
        assert (written == expected.numpy()).mean() > 0.999


def test_the_lab_opens_such_a_run(solved):
    (model,) = labs.open_session([str(solved.path)]).describe()["models"]
    assert model["sites"] == SITES
    assert model["word_sites"] == ["adapter", "attn_02", "mlp_02", "layer_02"]
    assert model["change_sites"] == ["adapter", "layer_02"]


def test_patching_refuses_a_part_as_the_read_out(solved):
    with pytest.raises(SystemExit, match="no layer is before the read-out attn_02;"):
        main(["patching", "--probes", str(solved.path), "--site", "attn_02"])
