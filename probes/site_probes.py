"""Probes at every site of a frozen MLLM: what `fit` and `solve` share.

`module.py` trains the probes by gradient descent, `solve/run.py` solves them.

Legend: S sites, N images of a dataset, B images of a batch, T image tokens on a grid h x w, d width, K channels of a
probe: of segmentation, classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llava_bidir.common.files import atomic_write
from llava_bidir.common.processes import rank_zero_info
from probes.data.batches import ProbeBatch, outputs_by_size
from probes.data.probe_data import ProbeData
from probes.heads import Probe
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.load import load
from probes.models.random_weights import MATCH_IMAGES
from probes.tasks import SEGMENTATION, TASKS, Task

# options with which the model is loaded as they are
LOADED = (
    "dtype",
    "image_px",
    "image_resize",
    "stride_px",
    "prefix",
    "cut",
    "match",
    "draw",
    "seed",
)
# options of the frozen model and its sites; the others of `ModelOptions` say how probes are trained
MODEL_SETTINGS = ("mllm", "num_classes", "image_attention", "untrained", "trust", "sites", *LOADED)


@dataclass
class SiteProbes:
    """A frozen MLLM and a probe at each of its sites.

    Args:
        mllm: The model.
        task: Task of the probes.
        heads: Probe of each site, by name.
        channels: K, outputs of a probe for each token.
    """

    mllm: FrozenMLLM
    task: Task
    heads: nn.ModuleDict
    channels: int

    @property
    def sites(self) -> list[str]:
        """Names of the sites."""
        return list(self.heads)

    def states(self, batch: ProbeBatch, sites: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the states f[B, T, d] by site, in the dtype of the model; None for all sites."""
        if "states" in batch:
            return batch["states"]
        return self.mllm.states(batch["pixels"], sites or self.sites)

    def logits(self, states: dict[str, Tensor]) -> Tensor:
        """Return the logits of the probes on the token grid, f32[S, B, K, h, w]."""
        logits = torch.stack([self.heads[site](states[site].float()) for site in self.sites])
        return logits.transpose(-1, -2).unflatten(-1, self.mllm.grid)


def load_probes(
    settings: Mapping[str, Any], data: ProbeData, device: torch.device, **of_probe: Any
) -> SiteProbes:
    """Load the MLLM, and build a probe for each site on the CPU.

    Generators of a CPU cannot draw on the GPU that is Lightning's default.

    Args:
        settings: Those that `MODEL_SETTINGS` names.
        data: Images and targets.
        device: Where the model runs.
        **of_probe: Arguments of :class:`.heads.Probe`: head, feature_norm, dropout, init_std.
    """
    matched = settings["match"] == "update"
    images = data.splits["training"]
    count = min(MATCH_IMAGES, len(images)) if matched else 0
    with torch.device("cpu"):
        mllm = load(
            settings["mllm"],
            settings["image_attention"],
            device=device,
            untrained=settings["untrained"] or (),
            trust=settings["trust"],
            # at equal distances from the first on
            match_images=[images[i * len(images) // count]["image"] for i in range(count)],
            **{name: settings[name] for name in LOADED},
        )
        rule = mllm.geometry.rule
        if rule.replaces:
            rank_zero_info(f"images become squares by: {rule.describe(mllm.geometry.image_px)}")
        task = TASKS[data.task]
        channels = task.channels or settings["num_classes"]
        sites = mllm.check_sites(settings["sites"])
        # sites that are read by name last: the others keep their numbers, with or without them
        numbered = list(dict.fromkeys([*mllm.sites, *mllm.all_sites, *sites]))
        heads = nn.ModuleDict()
        for site in sites:
            # the initialisation of a probe does not depend on the other probes of the run
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings["seed"] * 1_000_003 + numbered.index(site))
                heads[site] = Probe(
                    width=mllm.widths[site], classes=channels, grid=mllm.grid, **of_probe
                )
    return SiteProbes(mllm=mllm, task=task, heads=heads, channels=channels)


def save_predictions(
    probes: SiteProbes, logits: Tensor, batch: ProbeBatch, names: list[str], folder: Path
) -> None:
    """Write the predicted class of every pixel of a batch to FOLDER/SITE/NAME.png.

    Other tasks than segmentation write NAME.npy, float32 in the format of their targets.

    Args:
        probes: The probes.
        logits: f[S, squares, K, h, w] of the batch.
        batch: Targets, and the index of each image.
        names: Names of all images of the split.
        folder: RUN/predictions.
    """
    kind = "png" if probes.task.name == SEGMENTATION else "npy"
    for images, outputs, target in outputs_by_size(logits, batch["target"], probes.mllm.geometry):
        size = target.shape[1:3]
        view = probes.mllm.geometry.view(size)
        for site, logits_by_image in zip(probes.sites, outputs, strict=True):
            for i, of_image in zip(batch["index"][images].tolist(), logits_by_image, strict=True):
                prediction = probes.task.predict_pixels(of_image, size, view)
                path = folder / site / f"{names[i]}.{kind}"
                with atomic_write(path) as partial, partial.open("wb") as file:
                    if kind == "png":
                        Image.fromarray(prediction).save(file, kind)
                    else:
                        np.save(file, prediction)
