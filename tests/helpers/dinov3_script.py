"""DINOv3's own head, training step, schedule and evaluation, from a clone of facebookresearch/dinov3 at COMMIT.

Its files import data sets, launchers and torchvision, of which these functions use nothing on one CPU: such modules are
stand-ins, as is the backbone, which is transformers' own.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel

COMMIT = "6876159a11b4df116f30f667f8c9888617df0751"
FOLDER = "dinov3.eval.segmentation"
STAND_INS = [
    *(
        "pandas",
        "termcolor",
        "torchvision",
        "torchvision.transforms",
        "dinov3.data",
        "dinov3.eval.utils",
    ),
    *("dinov3.hub", "dinov3.hub.segmentors", f"{FOLDER}.transforms"),
    *(f"{FOLDER}.models.backbone.dinov3_adapter", f"{FOLDER}.models.heads.mask2former_head"),
]
# config-ade20k-linear-training.yaml, with warm-up as long as asked for
SCHEDULE = {
    "warmup_ratio": 1e-6,
    "final_div_factor": math.inf,
    "pct_start": 0,
    "anneal_strategy": "cos",
    "use_beta1": False,
    "update_momentum": False,
}


ROUNDING = 1e-6  # of the probability of a class in float32


class Evaluation(NamedTuple):
    """What the script counts of validation photos.

    Args:
        right, predicted, labelled: i64[K], pixels of each class.
        ties: Pixels whose two most probable classes are the same but for rounding.
    """

    right: Tensor
    predicted: Tensor
    labelled: Tensor
    ties: int


class Backbone(nn.Module):
    """Transformers' own encoder: the last block's patches after the final norm, as a list of one map."""

    def __init__(self, path: Path):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(path).eval().requires_grad_(False)
        self.patch = self.encoder.config.patch_size

    def forward(self, pixels: Tensor) -> list[Tensor]:
        rows = pixels.shape[-2] // self.patch
        states = self.encoder(pixels).last_hidden_state[:, 1:]
        return [states.mT.unflatten(2, (rows, -1))]


class DINOv3Script:
    """The script, with a head of `classes`.

    Args:
        clone: Folder of the clone.
        encoder: Folder of the backbone.
        classes: K.
        steps: Of the training.
        warmup: Of these.
    """

    def __init__(self, clone: Path, encoder: Path, classes: int, steps: int, warmup: int):
        with scripts(clone) as module:
            self.train, self.eval = module("train"), module("eval")
            head = module("models.heads.linear_head").LinearHead
            decoder = module("models").FeatureDecoder
            build_scheduler = module("schedulers").build_scheduler
            loss = module("loss").MultiSegmentationLoss
        backbone = Backbone(encoder)
        width = backbone.encoder.config.hidden_size
        settings = json.loads((Path(encoder) / "preprocessor_config.json").read_text())
        self.mean, self.std = (
            torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std")
        )
        self.classes = classes
        # without dropout, whose random numbers differ
        self.head = head([width], classes, dropout=0.0)
        model = decoder(nn.ModuleList([backbone, self.head]), nullcontext)
        self.parallel = nn.Module()  # in place of DistributedDataParallel
        self.parallel.module = model
        self.parallel.forward = model.forward
        trained = {
            "params": self.head.parameters(),
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "weight_decay": 1e-3,
        }
        self.optimizer = torch.optim.AdamW([trained])
        settings = SCHEDULE | {"warmup_iters": warmup}
        self.scheduler = build_scheduler(
            "WarmupOneCycleLR",
            optimizer=self.optimizer,
            lr=1e-3,
            total_iter=steps,
            constructor_kwargs=settings,
        )
        self.criterion = loss(diceloss_weight=0.0, celoss_weight=1.0)

    def normalised(self, image: Image.Image, px: int = 0) -> Tensor:
        """Return the pixels f[3, H, W] of an image; 0 is added at the right and the bottom up to px."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        normal = (pixels - 255 * self.mean) / (255 * self.std)
        missing = [max(px - side, 0) for side in normal.shape[1:]]
        return nn.functional.pad(normal, (0, missing[1], 0, missing[0]))

    def photos_of(self, run) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the validation photos of a run as the script sees them, and their labels."""
        for sample in run.dataset("validation"):
            photo = resized(sample["image"], run.manifest["config"]["image_px"])
            yield self.normalised(photo), torch.from_numpy(sample["target"])

    def step(self, number: int, pixels: Tensor, target: Tensor) -> float:
        """Train on a batch f[B, 3, H, W] with labels [B, H, W], and return its loss."""
        loss = self.train.train_step(
            self.parallel,
            (pixels, (None, target)),
            device="cpu",
            scaler=None,
            optimizer=self.optimizer,
            optimizer_gradient_clip=math.inf,
            scheduler=self.scheduler,
            criterion=self.criterion,
            model_dtype=None,
            global_step=number,
        )
        return loss.item()

    def evaluate(self, photos: Iterable[tuple[Tensor, Tensor]], px: int, stride: int) -> Evaluation:
        """Return what the script counts of photos.

        Args:
            photos: Pixels f[3, H, W] and labels u8[H', W'].
            px: Side of the windows.
            stride: From one to the next.
        """
        batches = []
        for pixels, labels in photos:
            # the script takes label 0 for none, as ADE20K has it
            shifted = torch.where(labels == 255, 255, labels.long() + 1)
            batches.append(([pixels[None]], (None, shifted[None, None])))
        counted, ties = [], []
        count, infer = self.eval.calculate_intersect_and_union, self.eval.make_inference

        def record(*args, **kwargs) -> Tensor:
            counted.append(count(*args, **kwargs))
            return counted[-1]

        def see_ties(*args, **kwargs) -> Tensor:
            shares = infer(*args, **kwargs)
            first, second = shares.topk(2, dim=1).values.unbind(1)
            ties.append((first - second < ROUNDING).sum())
            return shares

        with (
            patch.object(self.eval, count.__name__, record),
            patch.object(self.eval, infer.__name__, see_ties),
        ):
            self.eval.evaluate_segmentation_model(
                self.parallel,
                batches,
                device="cpu",
                eval_res=px,
                eval_stride=stride,
                decoder_head_type="linear",
                num_classes=self.classes,
                autocast_dtype=torch.float32,
            )
        self.parallel.train()
        right, _, predicted, labelled = torch.stack(counted).long().sum(0)
        return Evaluation(right, predicted, labelled, int(sum(ties)))


class scripts:
    """Import modules of the script's folder, beside stand-ins."""

    def __init__(self, clone: Path):
        self.clone = clone

    def __enter__(self) -> Callable[[str], SimpleNamespace]:
        stand_ins = {name: MagicMock() for name in STAND_INS}
        self.modules = patch.dict(sys.modules, stand_ins)
        self.path = patch.object(sys, "path", [str(self.clone), *sys.path])
        self.modules.start()
        self.path.start()
        return lambda name: importlib.import_module(f"{FOLDER}.{name}")

    def __exit__(self, *error) -> None:
        self.path.stop()
        self.modules.stop()


def resized(image: Image.Image, px: int) -> Image.Image:
    """Return a photo whose shorter side is px, as torchvision resizes PIL images."""
    width, height = image.size
    if height > width:
        size = (px, int(px * height / width + 0.5))
    else:
        size = (int(px * width / height + 0.5), px)
    return image.resize(size, Image.Resampling.BILINEAR)
