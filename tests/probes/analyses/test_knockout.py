"""The C.1 metric against a slow loop written from the paper's text."""

import json

import numpy as np
import pytest
import tiny
import torch

from probes import Knockout
from probes.analyses.knockout import CONDITIONS, PatchReader, knockout, read_cases
from probes.cli import main
from probes.results import ProbeRun

L = 3


@pytest.fixture(scope="module")
def run(checkpoints, tmp_path_factory) -> ProbeRun:
    """A run on pictures whose patches are often confused."""
    root = tiny.write_segmentation(tmp_path_factory.mktemp("data"), training=4, validation=9, seed=5)
    out = tmp_path_factory.mktemp("run")
    main(
        ["fit", "-c", "configs/demo/probes.yaml", "--out", str(out), "--trainer.max_epochs", "1"]
        + ["--model.mllm", str(checkpoints["bidirectional"]), "--data.root", str(root), "--data.batch_size", "2"]
    )
    return ProbeRun(out)


def predicted(run, reader, image: int, blocked=None) -> np.ndarray:
    """[L + 1, T] predicted class of each patch of one image."""
    sample = run.dataset()[image]
    cut = None if blocked is None else Knockout(torch.tensor(blocked)[None])
    return reader.predict(reader.mllm.preprocess([sample["image"]]), cut)[:, 0].numpy()


def truth(run, image: int) -> list[int]:
    """The most frequent labelled class under each of the 2 x 2 patches."""
    target = run.dataset()[image]["target"]
    height, width = target.shape
    cells = [target[: height // 2, : width // 2], target[: height // 2, width // 2 :]]
    cells += [target[height // 2 :, : width // 2], target[height // 2 :, width // 2 :]]
    return [int(np.bincount(cell[cell != 255], minlength=3).argmax()) for cell in cells]


def c1_by_loop(run, reader, c: int) -> dict[int, dict[str, list[float]]]:
    """Remaining rates by image under the three conditions of the paper."""
    found = {}
    for image in range(len(run.dataset())):
        labels, real = predicted(run, reader, image), truth(run, image)
        wrong = [t for t in range(4) if labels[0][t] == c and real[t] != c]
        if not wrong:
            continue
        others = [real[t] for t in wrong]
        correct = min(set(others), key=lambda k: (-others.count(k), k))
        rates = {}
        for condition, blocked_class in (("none", None), ("incorrect", c), ("correct", correct)):
            blocked = None if blocked_class is None else [bool(labels[0][t] == blocked_class) for t in range(4)]
            layers = predicted(run, reader, image, blocked)
            n = [sum(layers[i][t] == c and real[t] != c for t in range(4)) for i in range(L + 1)]
            rates[condition] = [x / len(wrong) for x in n]
        found[image] = rates
    return found


def confused(run) -> list[str]:
    """Classes that some image is wrongly called."""
    reader = PatchReader(run)
    return [name for k, name in enumerate(tiny.CLASSES) if c1_by_loop(run, reader, k)]


def test_equals_a_loop_over_images(run):
    reader, classes = PatchReader(run), confused(run)
    assert classes, "the fixture must confuse something"
    facts, tensors = knockout(run, classes, batch_size=2)
    for entry in facts["classes"]:
        name = entry["class"]
        expected = c1_by_loop(run, reader, tiny.CLASSES.index(name))
        assert tensors[f"{name}/image"].tolist() == list(expected) and entry["images"] == len(expected)
        for condition in ("none", "incorrect", "correct"):
            rates = np.array([rates[condition] for rates in expected.values()])
            np.testing.assert_allclose(tensors[f"{name}/{condition}"].numpy(), rates, atol=1e-6)
            np.testing.assert_allclose(entry["remaining"][condition], rates.mean(0), atol=1e-6)
            assert len(entry["ci95"][condition]) == L + 1
        assert all(entry["remaining"][condition][0] == pytest.approx(1.0) for condition in CONDITIONS)


def test_random_controls_block_as_many_patches(run, monkeypatch):
    classes, blocked = confused(run)[:1], []
    predict = PatchReader.predict

    def spy(self, pixels, knockout=None):
        if knockout is not None:
            blocked.extend(knockout.blocked.sum(1).tolist())
        return predict(self, pixels, knockout)

    monkeypatch.setattr(PatchReader, "predict", spy)
    knockout(run, classes, batch_size=64)
    by_case = np.array(blocked).reshape(-1, 4)  # incorrect, correct, random_incorrect, random_correct
    assert (by_case[:, 0] == by_case[:, 2]).all() and (by_case[:, 1] == by_case[:, 3]).all()
    assert (by_case[:, 0] > 0).all()


def test_same_seed_gives_the_same_file_and_fewer_cases_with_more_patches(run, tmp_path):
    name = confused(run)[0]
    for folder in ("a", "b"):
        main(["knockout", "--probes", str(run.path), "--classes", name, "--out", str(tmp_path / folder)])
    first, second = ((tmp_path / folder / "knockout.json").read_bytes() for folder in ("a", "b"))
    assert first == second and json.loads(first)["layers"] == "all"
    main(["knockout", "--probes", str(run.path), "--classes", name])
    everything = read_cases(run, 1)
    more = read_cases(run, 2)
    assert more is None or len(more.images) <= len(everything.images)
    assert read_cases(run, 99) is None


def test_mean_over_cases_resamples_images(run):
    main(["knockout", "--probes", str(run.path), "--classes", *confused(run)])
    cases = read_cases(run, 1)
    mean, resampled = cases.mean(cases.rates["none"], run.weights)
    assert torch.allclose(mean, cases.rates["none"].double().mean(0))
    assert resampled.shape == (2000, L + 1) and torch.allclose(resampled[:, 0], torch.ones(2000).double())


def test_unknown_names_are_errors(run):
    with pytest.raises(ValueError, match="unknown class 'moon'; .* has sky, wall, road"):
        knockout(run, ["moon"])
    with pytest.raises(ValueError, match="unknown labels_from 'layer_9'"):
        knockout(run, ["sky"], labels_from="layer_9")
    with pytest.raises(ValueError, match="no image has 5 or more patches wrongly predicted any of sky, wall"):
        knockout(run, ["sky", "wall"], min_patches=5)
