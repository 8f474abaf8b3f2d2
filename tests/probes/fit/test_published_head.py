"""A head planted in the publisher's file format is scored to the last count."""

import pickle

import numpy as np
import probe_runs
import pytest
import tiny_models
import torch
from tiny_encoders import MEAN, STD, STOCK
from torch import nn
from transformers import Dinov2Model
from windows import compose

from probes.cli import main
from probes.runs.files import read_tensors
from probes.runs.read import ProbeRun

SIZE, PX, STRIDE = (20, 40), 20, 13
TINY = f"""-c dinov2-linear --data.dataset folder --data.name photos --data.num_workers 0 --model.image_px {PX}
    --model.stride_px {STRIDE} --trainer.accelerator cpu --trainer.enable_progress_bar false"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    encoder = STOCK["dinov2"].write(tmp_path_factory.mktemp("dinov2"))
    photos = tiny_models.write_segmentation(tmp_path_factory.mktemp("photos"), size=SIZE)
    return lambda out: probe_runs.places(encoder, photos, out)


@pytest.fixture(scope="module")
def head() -> nn.Module:
    """Batch norm and a convolution under mmsegmentation's names."""
    torch.manual_seed(3)
    decode_head = nn.ModuleDict({"bn": nn.BatchNorm2d(16), "conv_seg": nn.Conv2d(16, 3, 1)})
    for parameter in decode_head.parameters():
        nn.init.normal_(parameter)
    decode_head.bn.running_mean.normal_()
    decode_head.bn.running_var.uniform_(0.5, 2)
    return nn.ModuleDict({"decode_head": decode_head}).eval()


@pytest.fixture
def file(head, tmp_path):
    torch.save({"meta": {"iter": 40_000}, "state_dict": head.state_dict()}, tmp_path / "head.pth")
    return tmp_path / "head.pth"


def test_a_planted_head_is_scored_to_the_last_count(head, file, places, tmp_path, caplog):
    main(["fit", *TINY.split(), *places(tmp_path / "run"), "--head", str(file)])
    run = ProbeRun(tmp_path / "run")
    encoder = run.manifest["config"]["mllm"]
    model = Dinov2Model.from_pretrained(encoder).eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    counts = read_tensors(run.path / "counts.safetensors")
    for i, sample in enumerate(run.dataset()):
        pixels = torch.tensor(np.asarray(sample["image"])).permute(2, 0, 1) / 255
        normal = (pixels - mean) / std
        windows = torch.stack([normal[:, :, left : left + PX] for left in (0, 13, 20)])
        with torch.no_grad():
            maps = model(windows).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (5, 5))
            outputs = head["decode_head"].conv_seg(head["decode_head"].bn(maps))
        classes = compose(outputs, SIZE, PX, STRIDE).argmax(0).numpy()
        labels = sample["target"]
        for k in range(3):
            right = int(((classes == k) & (labels == k)).sum())
            assert counts["intersection"][0, i, k] == right
            assert counts["predicted"][0, i, k] == ((classes == k) & (labels != 255)).sum()
    assert run.metrics["probe"]["steps"] == 0
    assert run.metrics["sites"][0]["history"] == []
    assert "mIoU final_norm" in caplog.text
    assert run.predict(sample["image"], "final_norm").shape == SIZE
    assert (run.path / "config.yaml").is_file()


class Planted:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("decode_head.bn.bias"), "decode_head.bn.bias differs"),
        (lambda state: state.update({"decode_head.extra": torch.ones(1)}), "extra differs"),
        (
            lambda state: state.update({"decode_head.bn.bias": torch.full((16,), torch.nan)}),
            "not finite in .*bn.bias",
        ),
        (
            lambda state: state.update({"decode_head.conv_seg.weight": torch.ones(3, 64, 1, 1)}),
            r"reads 64 channels, but final_norm has 16; .* \(\+ms and linear4 read four\)",
        ),
    ],
)
def test_another_head_is_refused_by_name(change, message, head, file, places, tmp_path):
    state = head.state_dict()
    change(state)
    torch.save(state, file)
    with pytest.raises(SystemExit, match=message):
        main(["fit", *TINY.split(), *places(tmp_path / "run"), "--head", str(file)])
    assert not (tmp_path / "run").exists()


def test_code_in_a_file_is_not_run(file, places, tmp_path, capsys):
    file.write_bytes(pickle.dumps(Planted()))
    with pytest.raises(SystemExit, match="is no torch file of tensors alone"):
        main(["fit", *TINY.split(), *places(tmp_path / "run"), "--head", str(file)])
    assert "executed" not in capsys.readouterr().out


def test_a_head_needs_its_site(file, places, tmp_path):
    more = ["--head", str(file), "--model.sites", "[layer_01, final_norm]"]
    with pytest.raises(SystemExit, match="is of one site; name it"):
        main(["fit", *TINY.split(), *places(tmp_path / "run"), *more])
