"""Labels of other images, the control of probe training."""

import numpy as np
import probe_runs
import tiny_models
import torch
from PIL import Image

from probes.ops.quadrature import prepare_masks
from probes.training.labels import shuffle_masks


def test_shuffled_gives_every_image_the_mask_of_another():
    target = torch.arange(5, dtype=torch.uint8).view(5, 1, 1).expand(5, 3, 4)
    masks = prepare_masks(target, 5, (3, 4))
    shuffled = shuffle_masks(masks)
    assert torch.equal(shuffled.soft, masks.soft.roll(1, 0)) and torch.equal(shuffled.mass, masks.mass.roll(1, 0))
    for depths in (target.float(), list(target.float())):
        assert [depth[0, 0].item() for depth in shuffle_masks(depths)] == [4, 0, 1, 2, 3]


def test_shuffled_depths_take_the_size_of_their_new_image():
    depths = [torch.rand(size) for size in ((6, 4), (9, 5), (7, 7))]
    for i, depth in enumerate(shuffle_masks(depths)):
        other = depths[i - 1]
        rows, columns = (
            ((torch.arange(n) + 0.5) * m / n).long() for n, m in zip(depths[i].shape, other.shape, strict=True)
        )
        assert torch.equal(depth, other[rows][:, columns])


def test_single_image_has_no_shuffled_label():
    shuffled = shuffle_masks(prepare_masks(torch.zeros(1, 2, 2, dtype=torch.uint8), 3, (2, 2)))
    assert not shuffled.soft.any() and not shuffled.mass.any() and not shuffled.pixels.any()
    assert shuffle_masks(torch.zeros(1, 2, 2))[0].isnan().all() and shuffle_masks([torch.zeros(2, 2)])[0].isnan().all()


def test_shuffled_labels_allow_position_only(checkpoints, tmp_path):
    """Images of one class each: there is nothing to learn but which image has which, and that is what is shuffled."""
    root = tiny_models.write_segmentation(tmp_path / "data", training=12, validation=6)
    for mask in root.glob("annotations/*/*.png"):
        number = int(mask.stem) % 3
        Image.fromarray(np.full((24, 20), number, np.uint8)).save(mask)
        image = np.full((24, 20, 3), 30, np.uint8)
        image[..., number] = 200
        Image.fromarray(image).save(root / "images" / mask.parent.name / mask.name)
    more, pacc = ["--trainer.max_epochs", "20", "--data.batch_size", "4", "--model.sites", "[encoder]"], {}
    for labels in ("true", "shuffled"):
        run = probe_runs.fit(checkpoints["causal"], root, tmp_path / labels, *more, "--model.labels", labels)
        pacc[labels] = run.metrics["sites"][0]["pacc"]
        assert run.metrics["probe"]["labels"] == labels
    assert pacc["true"] > 0.95 and pacc["shuffled"] < 0.7
