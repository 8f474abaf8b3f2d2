"""Runs on windows of photos of 2:1: scores and predictions are those of crops that are composed by hand."""

import numpy as np
import probe_runs
import pytest
import reference
import tiny_models
import torch
from PIL import Image
from tiny_encoders import MEAN, STD, STOCK
from transformers import Dinov2Model
from windows import compose

from probes.cli import main
from probes.data.windows import training_samples
from probes.runs.read import ProbeRun

SIZE = (20, 40)  # of photos
PX, STRIDE = 18, 12  # of windows: no multiple of the patch, so that they are the middle of 20 px
SLIDE = f"--model.image_resize slide --model.image_px {PX} --model.stride_px {STRIDE}".split()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return STOCK["dinov2"].write(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tiny_models.write_segmentation(tmp_path_factory.mktemp("photos"), size=SIZE)


@pytest.fixture(scope="module", params=["solve", "fit"])
def run(request, encoder, photos, tmp_path_factory) -> ProbeRun:
    out = tmp_path_factory.mktemp(request.param)
    words = "-c configs/demo/probes.yaml --save_predictions true".split()
    words += ["--model.sites", "[layer_02, final_norm]", *SLIDE, "--data.batch_size", "2"]
    if request.param == "solve":
        words += "--folds 2 --strengths 0.1".split()
    else:
        words += "--data.cache_features false --trainer.max_epochs 2".split()
    main([request.param, *words, *probe_runs.places(encoder, photos, out)])
    return ProbeRun(out)


def windows_by_hand(photo: Image.Image) -> torch.Tensor:
    """Return the normalised windows f[windows, 3, 20, 20] of a photo of 2:1, black around 18 x 18 px."""
    resized = photo.resize((2 * PX, PX), Image.Resampling.BILINEAR)
    pixels = torch.tensor(np.asarray(resized) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
    normal = ((pixels - mean) / std).float()
    windows = torch.zeros(3, 3, 20, 20)
    for window, left in zip(windows, (0, 12, 18), strict=True):
        window[:, 1:19, 1:19] = normal[:, :, left : left + PX]
    return windows


def test_predictions_are_those_of_crops_composed_by_hand(run, encoder):
    model = Dinov2Model.from_pretrained(encoder).eval()
    targets = []
    predictions = []
    for sample in run.dataset():
        with torch.no_grad():
            states = model(windows_by_hand(sample["image"])).last_hidden_state[:, 1:]
            outputs = run.probes()["final_norm"](states)
        logits = compose(outputs.transpose(1, 2).unflatten(2, (5, 5)), SIZE, PX, STRIDE)
        top, second = logits.topk(2, 0).values
        sure = (top - second > 1e-4).numpy()
        assert sure.mean() > 0.98
        saved = run.path / "predictions/final_norm" / f"{sample['name']}.png"
        for found in (np.asarray(Image.open(saved)), run.predict(sample["image"], "final_norm")):
            assert np.array_equal(found[sure], logits.argmax(0).numpy()[sure])
        targets.append(sample["target"])
        predictions.append(np.asarray(Image.open(saved)))
    miou, pacc, _ = reference.scores(predictions, targets, 3)
    entry = run.metrics["sites"][-1]
    assert (entry["miou"], entry["pacc"]) == pytest.approx((miou, pacc))
    assert run.metrics["image_resize"] == "slide"


def test_training_sees_the_windows_with_the_pixels_of_their_masks(run):
    """18 of 36 px from 0, 12 and 18 are 20 of 40 pixels from 0, 13 and 20."""
    dataset = run.dataset("training")
    mllm = run.mllm()
    samples = training_samples(dataset, mllm)
    assert samples.photo_of.tolist() == [photo for photo in range(6) for _ in range(3)]
    expected = windows_by_hand(dataset[1]["image"])
    for number, left in enumerate((0, 13, 20)):
        sample = samples[3 + number]
        assert np.array_equal(sample["target"], dataset[1]["target"][:, left : left + 20])
        pixels = samples.preprocess([sample["image"]])
        torch.testing.assert_close(pixels[0], expected[number], rtol=0, atol=1e-5)
