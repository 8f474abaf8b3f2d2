"""Three validation photos of a run and what its probes read there at each site, for the report: RUN/pictures.npz.

The photos are chosen by a rule, their share of right pixels at the best site: "typical" is the median, "easy" and
"hard" the upper and lower tenth. What another model's run of the same study shows already is shown of this one, too,
so that a photo compares models.

    data              of the images, a hash
    palette           uint8[K, 3], colours of the classes
    sites             names of the sites
    typical/index     of the photo in the validation split
    typical/photo     uint8[H, W, 3], at most 360 px; also easy/..., hard/...
    typical/truth     uint8[h, w], at most 256 px; 255 without a label; int16 and -1 of more than 255 classes
    typical/maps      uint8[S, h, w] or uint16, classes at the sites
"""

from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import atomic_write
from llava_bidir.common.processes import rank_zero_warn
from probes.data.image_dataset import palette_of
from probes.site_probes import SiteProbes

FILE = "pictures.npz"
QUANTILES = {"typical": 0.5, "easy": 0.9, "hard": 0.1}
PHOTO_PX = 360
MAP_PX = 256


@torch.no_grad()
def save_pictures(
    probes: SiteProbes, counted: dict[str, Tensor], dataset, folder: Path, data: str
) -> None:
    """Write pictures.npz of probes of segmentation into the folder of their run: one forward for each photo.

    Args:
        probes: The model and its probes.
        counted: What the task counts of each image, by name.
        dataset: The validation split.
        folder: Of the run.
        data: Hash of the images.
    """
    task = probes.task
    scores = task.dataset_scores(task.sums(counted).sum(-2))[task.score]
    pictures = {
        "data": np.array(data),
        "palette": palette_of(dataset),
        "sites": np.array(probes.sites),
    }
    chosen = shown_photos(folder, data) or choose_photos(counted, int(scores.argmax()))
    for name, index in chosen.items():
        sample = dataset[index]
        truth = sample["target"]
        maps = predict_sites(probes, sample["image"], size=truth.shape)
        photo = sample["image"].convert("RGB")
        photo.thumbnail((PHOTO_PX, PHOTO_PX))
        step = -(-max(truth.shape) // MAP_PX)
        pictures[f"{name}/index"] = np.array(index)
        pictures[f"{name}/photo"] = np.asarray(photo)
        pictures[f"{name}/truth"] = truth[::step, ::step]
        pictures[f"{name}/maps"] = maps[:, ::step, ::step]
    with atomic_write(folder / FILE) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **pictures)


def shown_photos(folder: Path, data: str) -> dict[str, int]:
    """Return the photos of the first run beside DIR/MODEL/ARM, DIR/*/ARM, that shows these images; {} without one."""
    folder = folder.absolute()
    for file in sorted(folder.parent.parent.glob(f"*/{folder.name}/{FILE}")):
        pictures = read_pictures(file.parent)
        if pictures.get("data") == data and file.parent != folder:
            return {name: int(pictures[f"{name}/index"]) for name in names_of(pictures)}
    return {}


def choose_photos(counted: dict[str, Tensor], best: int) -> dict[str, int]:
    """Return the index of each photo by name, each photo once; `best` is the number of the best site."""
    right = counted["intersection"][best].sum(-1).double()
    accuracy = right / counted["labelled"].sum(-1)
    order = accuracy.nan_to_num(0).argsort(stable=True).tolist()
    chosen: dict[str, int] = {}
    for name, quantile in QUANTILES.items():
        index = order[round(quantile * (len(order) - 1))]
        if index not in chosen.values():
            chosen[name] = index
    return chosen


def predict_sites(probes: SiteProbes, image: Image, size: tuple[int, int]) -> np.ndarray:
    """Return the classes that the probe of each site predicts for pixels of an image of `size`, uint8[S, H, W]."""
    mllm = probes.mllm
    device = next(probes.heads.parameters()).device
    states = mllm.states(mllm.preprocess([image]), probes.sites)
    on_device = {site: states_of_site.to(device) for site, states_of_site in states.items()}
    logits = mllm.geometry.join(probes.logits(on_device), size)
    return probes.task.predict_pixels(logits, size, mllm.geometry.view(size))


def read_pictures(folder: Path) -> dict[str, np.ndarray]:
    """Return what a run's pictures.npz has; {} without the file, and with a warning if it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        with error_context(path), np.load(path) as pictures:
            return dict(pictures)
    except UserError as error:
        rank_zero_warn(f"{error}; its photos are left out")
        return {}


def names_of(pictures: dict[str, np.ndarray]) -> list[str]:
    """Return the names of the photos."""
    return [name for name in QUANTILES if f"{name}/photo" in pictures]
