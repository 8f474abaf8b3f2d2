"""`fit --flip`: outputs of the photo and of its mirror image, averaged, by hand."""

import numpy as np
import probe_runs
import pytest
import tiny_models
import torch
from task_runs import write_targets
from tiny_encoders import STOCK
from torch.nn import functional as F

from probes.cli import main
from probes.runs.read import ProbeRun


@pytest.fixture
def words(tmp_path):
    encoder = STOCK["dinov2"].write(tmp_path / "model")
    photos = write_targets(tiny_models.write_segmentation(tmp_path / "data"), tmp_path / "photos")
    demo = "fit -c configs/demo/probes.yaml --model.sites [final_norm] --trainer.max_epochs 2"
    more = "--data.cache_features false --save_predictions true --flip".split()
    return [*demo.split(), *more, *probe_runs.places(encoder, photos, tmp_path / "run")]


def test_depth_is_that_of_the_mean_of_both(words, tmp_path):
    main([*words, "--data.task", "depth"])
    run = ProbeRun(tmp_path / "run")
    mllm, probes = run.loaded
    for sample in run.dataset():
        pixels = mllm.preprocess(sample["image"])
        maps = []
        for x in (pixels, pixels.flip(-1)):
            states = mllm.states(x, ["final_norm"])["final_norm"]
            maps.append(probes["final_norm"](states).transpose(1, 2).unflatten(2, mllm.grid))
        mean = (maps[0] + maps[1].flip(-1)) / 2
        expected = F.interpolate(mean, sample["target"].shape, mode="bilinear")[0, 0].exp()
        saved = np.load(run.path / "predictions/final_norm" / f"{sample['name']}.npy")
        for found in (saved, run.predict(sample["image"], "final_norm")):
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
        assert not torch.allclose(maps[0], maps[1].flip(-1)), "else the test sees nothing"


def test_normals_and_cached_states_are_refused(words):
    for more in (["--data.task", "normals"], ["--data.cache_features", "true"]):
        with pytest.raises(SystemExit, match="model.flip: expected data.cache_features false"):
            main([*words, *more])
