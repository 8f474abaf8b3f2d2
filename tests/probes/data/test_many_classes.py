"""More than 255 classes: masks of 16 bits are read, prepared, counted and solved as arithmetic on their labels says."""

import json
from pathlib import Path

import numpy as np
import pytest
import solving
import tiny_models
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, interpolate

from probes.cli import main
from probes.data.batches import MaskPreparer
from probes.data.folder import FolderDataset
from probes.data.targets import ClassBoundaries
from probes.data.verify import count_labels
from probes.ops.cross_entropy import upsampled_cross_entropy
from probes.ops.geometry import Geometry
from probes.ops.pixel_counts import count
from probes.runs.read import ProbeRun
from probes.solve.features import solve_features

K = 400
PLACES = [3, 255, 399]  # of the classes among many
GEOMETRY = Geometry(grid=(3, 4), image_px=12, covered_px=12)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return tiny_models.write_segmentation(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """The same masks, with numbers among 400 classes, in 16 bits; 65535 is ignored."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("many"))
    table = np.full(256, 65_535, np.uint16)
    table[: len(PLACES)] = PLACES
    for file in root.glob("annotations/*/*.png"):
        Image.fromarray(table[np.asarray(Image.open(file))]).save(file)
    names = [f"none {k}" for k in range(K)]
    for name, k in zip(tiny_models.CLASSES, PLACES, strict=True):
        names[k] = name
    (root / "classes.json").write_text(json.dumps({"classes": names}))
    return root


def targets(root: Path) -> list[np.ndarray]:
    return [sample["target"] for sample in FolderDataset(root, "validation")]


def test_masks_are_read_as_they_are(few, many):
    for small, large in zip(targets(few), targets(many), strict=True):
        assert (large == np.array([*PLACES, -1])[np.minimum(small, len(PLACES))]).all()
        labels, of_many = count_labels(small, len(PLACES)), count_labels(large, K)
        assert of_many.pixels[PLACES].tolist() == labels.pixels.tolist()
        assert sum(of_many.pixels) == sum(labels.pixels)
        assert of_many.ignored == labels.ignored > 0


def test_boundaries_and_labels_of_patches_are_those_of_few_classes(few, many):
    for small, large in zip(
        *(ClassBoundaries(FolderDataset(root, "validation")) for root in (few, many)), strict=True
    ):
        assert (small["target"] == large["target"]).all()
    for small, large in zip(targets(few), targets(many), strict=True):
        of_few = GEOMETRY.patches(torch.tensor(small))
        expected = torch.tensor([*PLACES, -1])[of_few]
        assert GEOMETRY.patches(torch.tensor(large)).equal(expected)


def test_loss_and_counts_are_those_of_upsampled_logits(many):
    target = torch.from_numpy(np.stack(targets(many)))
    logits = torch.randn(len(target), K, *GEOMETRY.grid, generator=torch.manual_seed(0))
    logits[:, PLACES] += 2  # so that some are right
    up = interpolate(logits, target.shape[-2:], mode="bilinear")
    masks = MaskPreparer(GEOMETRY, K, None)(target)
    loss = upsampled_cross_entropy(logits, masks)
    assert loss.item() == pytest.approx(
        cross_entropy(up, target.long(), ignore_index=-1).item(), abs=1e-5
    )
    counts = count(logits[None], target)
    best = up.argmax(1)
    for image in range(len(target)):
        labelled = target[image] != -1
        right = best[image][labelled & (best[image] == target[image])].bincount(minlength=K)
        assert counts.intersection[0, image].equal(right)
        assert counts.predicted[0, image].equal(best[image][labelled].bincount(minlength=K))
        assert counts.labelled[image].equal(target[image][labelled].bincount(minlength=K))
    assert counts.intersection[..., PLACES].sum() > 0


def test_solved_features_ignore_minus_one_and_no_class(many):
    """255 would leave out the pixels of class 255."""
    masks = [target.astype(np.int64) for target in targets(many)]
    features = torch.randn(len(masks), 2, 2, 3, generator=torch.manual_seed(0))
    probe = solve_features(features, masks, classes=K, strength=1.0, folds=2)
    assert probe.converged
    assert probe.bias[255] > probe.bias[254]
    moved = [np.where(mask == 255, 254, mask) for mask in masks]
    other = solve_features(features, moved, classes=K, strength=1.0, folds=2)
    # renumbered classes end within 5e-5 of each other, also below 255 of them
    assert probe.loss == pytest.approx(other.loss, rel=1e-4)


def test_a_run_scores_and_writes_what_it_predicts(checkpoints, many, tmp_path):
    more = ["--save_predictions", "true"]
    main(solving.arguments(checkpoints["causal"], many, tmp_path / "run", *more))
    run = ProbeRun(tmp_path / "run")
    truth = np.stack(targets(many))
    for row in run.metrics["sites"]:
        folder = tmp_path / "run/predictions" / row["site"]
        maps = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])
        assert maps.max() < K
        labelled = truth != -1
        ious = []
        for k in range(K):
            right, either = (maps == k) & (truth == k), (maps == k) | (truth == k)
            if either[labelled].any():
                ious.append(right[labelled].sum() / either[labelled].sum())
        assert row["miou"] == pytest.approx(np.mean(ious), abs=1e-6)
        assert row["iou_per_class"][255] is not None
    certified = [row["certificates"] for row in run.strengths.sites]
    assert all(x["converged"] for row in certified for x in row if x)
