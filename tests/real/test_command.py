"""`make real` from the plan to the reports, on two layers of the model and a world of a hundredth."""

import json
from pathlib import Path

import pytest
import torch
from run_bytes import run_bytes
from transformers import Dinov2Config, Dinov2Model

from experiments.real import plan as real_plan
from experiments.real import run as real

pytestmark = [pytest.mark.real, pytest.mark.nightly]

STEPS = 2  # of each stage, as many as one minute has room for
MASKS = ("causal", "bidirectional")


@pytest.fixture
def out(two_layers, tmp_path, monkeypatch) -> Path:
    """The folder of the command, which has a tiny encoder and the language model already."""
    out = tmp_path / "real"
    out.mkdir()
    (out / "llm").symlink_to(two_layers)
    torch.manual_seed(0)
    px = real_plan.PATCH_PX
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Dinov2Config(**sizes, patch_size=px, image_size=5 * px)
    Dinov2Model(config).save_pretrained(out / "encoder")
    seconds = 60 * real.TRAINING_SHARE / ((1 + real_plan.STAGE1_SHARE) * STEPS)
    monkeypatch.setattr(real_plan, "measure_step", lambda llm, tokens: ("32-true", seconds))
    monkeypatch.setattr(real, "SCALE", 0.01)
    monkeypatch.setattr(real, "SITES", ["encoder", "adapter", "layer_01", "layer_02"])
    return out


def test_it_trains_and_studies_the_model_and_its_controls_and_then_has_nothing_to_do(out, capsys):
    words = f"--out {out} --minutes 1 --controls --draws 1".split()
    real.main(words)
    assert f"{STEPS} steps of stage 1, {STEPS} of stage 2" in capsys.readouterr().out
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["precision"], plan["steps"]) == ("32-true", STEPS)

    labels = {f"{name}, {mask}" for name in real.MODELS for mask in MASKS}
    assert set(json.loads((out / "language.json").read_text())) == {"language model"} | labels
    for name, model in real.MODELS.items():
        for mask in MASKS:
            hf = out / model.folder / mask / model.stage / "hf"
            training = json.loads((hf / "training.json").read_text())
            assert training["steps"] == STEPS
            assert training["llm"] == str(out / model.llm)
            assert json.loads((hf / "config.json").read_text())["image_attention"] == mask
        report = json.loads((out / name / "report/results.json").read_text())
        assert set(report["masks"]) == set(MASKS)
        claims = {claim["claim"] for claim in report["claims"]}
        assert {"adapter_drop", "recovery"} <= claims

    before = run_bytes(out)
    real.main(words)
    assert "begins" not in capsys.readouterr().out, "no model is trained again"
    after = run_bytes(out)
    changed = {file for file in before | after if before.get(file) != after.get(file)}
    assert not {file for file in changed if not file.endswith(".log")}
