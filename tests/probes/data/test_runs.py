"""Probe runs on an official layout, and cached states."""

import dataset_layouts
import numpy as np
import probe_runs
import pytest
import torch

import probes
from probes.cli import main
from probes.data.batches import CachedFeatures, PreprocessedDataset
from probes.data.registry import open_dataset
from probes.data.samplers import PAD_INDEX
from probes.runs.read import ProbeRun

pytestmark = pytest.mark.numerics


def test_run_on_an_official_layout_is_read_back_with_its_options(checkpoints, tmp_path):
    root = dataset_layouts.write_voc2012(tmp_path / "VOCdevkit/VOC2012")
    words = (
        "-c configs/probes/voc2012.yaml --trainer.max_epochs 1 --trainer.accelerator cpu".split()
    )
    words += "--data.num_workers 0 --data.options.background class --model.sites [adapter]".split()
    places = probe_runs.places(checkpoints["causal"], root.parent, tmp_path / "run")
    main(["fit", *words, *places])
    run = ProbeRun(tmp_path / "run")
    assert run.metrics["dataset"] == "voc2012"
    assert len(run.metrics["classes"]) == 21
    assert run.manifest["data"]["options"] == {"background": "class", "train_list": "trainaug"}
    validation = run.dataset()
    assert validation.classes == run.metrics["classes"]
    assert validation.names == ["2007_000033", "2007_000042"]
    labelled = [np.bincount(sample["target"].ravel(), minlength=256)[:21] for sample in validation]
    assert (run.counts.labelled.numpy() == labelled).all()


@pytest.fixture
def prepared(checkpoints, segmentation):
    mllm = probes.load(checkpoints["causal"], device="cpu", dtype=torch.bfloat16)
    return mllm, PreprocessedDataset(
        open_dataset("folder", str(segmentation), "validation"), mllm.preprocess
    )


def test_cached_states_are_the_models_in_its_dtype(prepared):
    mllm, images = prepared
    cached = CachedFeatures(mllm, images, ["adapter", "layer_02"], batch_size=2)
    batch = cached.__getitems__([3, 0])
    pixels = torch.cat([images[i]["pixels"] for i in (3, 0)])
    assert batch["index"].tolist() == [3, 0]
    for site, states in mllm.states(pixels, ["adapter", "layer_02"]).items():
        # bf16 in other batches
        torch.testing.assert_close(batch["states"][site], states, rtol=0.02, atol=0.02)
    assert (batch["target"][0] == images[3]["target"]).all()
    nothing = cached.__getitems__([PAD_INDEX])
    assert (nothing["target"][0] == 255).all()
    assert nothing["index"].tolist() == [PAD_INDEX]


def test_states_that_do_not_fit_are_refused_before_the_first_forward(prepared):
    mllm, images = prepared
    size = 5 * (4 * 32 * 2 + images[0]["target"].nbytes)  # images, tokens, width, bytes
    copies = 10**15 // size
    with pytest.raises(ValueError, match=rf"needs {copies * size / 1e9:.2f} GB .*choose fewer"):
        CachedFeatures(mllm, images, ["adapter"], batch_size=2, copies=copies)
