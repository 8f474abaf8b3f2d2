"""Predictions of every pixel, as files of a run."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from probes.data.batches import group_by_size
from probes.site_probes import SiteProbes
from probes.tasks import SEGMENTATION


def save_predictions(
    probes: SiteProbes,
    logits: Tensor,
    batch: dict[str, Any],
    names: list[str],
    folder: Path,
) -> None:
    """Write the predicted class of every pixel of a batch to FOLDER/SITE/NAME.png.

    Other tasks than segmentation write NAME.npy, float32 in the format of their targets.

    Args:
        probes: The probes.
        logits: f[S, B, K, h, w] of the batch.
        batch: Targets, and the index of each image.
        names: Names of all images of the split.
        folder: RUN/predictions.
    """
    for images, target in group_by_size(batch["target"]):
        size = tuple(target.shape[1:3])
        view = probes.mllm.geometry.view(size)
        for site, logits_by_image in zip(probes.sites, logits[:, images], strict=True):
            (folder / site).mkdir(parents=True, exist_ok=True)
            for i, of_image in zip(batch["index"][images].tolist(), logits_by_image, strict=True):
                prediction = probes.task.predict_pixels(of_image, size, view)
                if probes.task.name == SEGMENTATION:
                    Image.fromarray(prediction).save(folder / site / f"{names[i]}.png")
                else:
                    np.save(folder / site / f"{names[i]}.npy", prediction)
