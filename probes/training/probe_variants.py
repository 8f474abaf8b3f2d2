"""Probe variants: settings of probe training that differ from the main ones, trained on the same frozen forward.

model:
  feature_norm: none                        the arguments of `ProbeModule` are the main variant
  variants:
    batchnorm: {feature_norm: batchnorm}    a further variant lists the settings that differ
    shuffled: {labels: shuffled}
"""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from llava_bidir.common.errors import UserError
from probes.evaluation.metrics import IGNORE_INDEX

from .heads import FEATURE_NORMS, HEADS


@dataclass(frozen=True)
class ProbeVariant:
    """Settings by which the probes of all sites are trained.

    Args:
        head: linear (the paper), or another name in `heads.py`.
        feature_norm: none (the paper), batchnorm or layernorm, before the head.
        learning_rate: Initial learning rate of AdamW.
        labels: "true", or "shuffled": a control trained on the masks of other images.
        seed: Seed of the initialisation. The order of images depends on the seed of the run only.

    Raises:
        UserError: If a value is not allowed.
    """

    head: str = "linear"
    feature_norm: str = "none"
    learning_rate: float = 1e-3
    labels: str = "true"
    seed: int = 0

    def __post_init__(self):
        for key, allowed in (("head", HEADS), ("feature_norm", FEATURE_NORMS), ("labels", LABELS)):
            if getattr(self, key) not in allowed:
                raise UserError(f"unknown {key} {getattr(self, key)!r}; expected one of {', '.join(allowed)}")
        if not _is_number(self.learning_rate, float, int) or not self.learning_rate > 0:
            raise UserError(f"learning_rate must be a number above 0, got {self.learning_rate!r}")
        if not _is_number(self.seed, int):
            raise UserError(f"seed must be an integer, got {self.seed!r}")


def _is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def build_variants(main: ProbeVariant, further: dict[str, dict[str, Any]]) -> dict[str | None, ProbeVariant]:
    """Return the variants of a run by name, the main one under None.

    A variant that equals an earlier one is skipped, so that one config of variants serves any main variant. It would
    train the same probes again and look like another seed.

    Raises:
        UserError: If a name cannot be part of a tensor name, or a key or value is unknown.
    """
    variants: dict[str | None, ProbeVariant] = {None: main}
    for name, changes in further.items():
        key = f"model.variants.{name}"
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{key}: the name of a variant may contain letters, digits, _ and -")
        allowed = [field.name for field in fields(ProbeVariant)]
        if not isinstance(changes, dict) or set(changes) - set(allowed):
            raise UserError(f"{key} must set some of {', '.join(allowed)}, got {changes!r}")
        try:
            variant = replace(main, **changes)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        if variant in variants.values():
            rank_zero_info(f"{key} equals another variant (the main one is {main}) and is skipped")
        else:
            variants[name] = variant
    return variants


def probe_name(variant: str | None, site: str) -> str:
    """Return the name of a probe in checkpoints, probes.safetensors and logs; the site alone for the main variant."""
    return site if variant is None else f"recipes/{variant}/{site}"


def shuffle_masks(target: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Return the masks rolled by one image, so that no image keeps its own.

    A probe can then learn position and class frequencies only. The pairs change each epoch with the order of images.
    Masks of different sizes are resized to the size of the image, by nearest pixel. A single image in a batch is
    ignored, because there is no other mask.

    Args:
        target: uint8[B, H, W], or a list of B masks uint8[H, W]; for other tasks f[B, H, W] or f[B, H, W, 3].
    """
    if len(target) == 0:
        return target
    if len(target) == 1:
        value = torch.nan if target[0].is_floating_point() else IGNORE_INDEX
        ignored = target[0].new_full(target[0].shape, value)
        return ignored[None] if isinstance(target, Tensor) else [ignored]
    if isinstance(target, Tensor):
        return target.roll(1, 0)
    return [_resize_mask(other, mask.shape[:2]) for other, mask in zip([target[-1], *target[:-1]], target, strict=True)]


def _resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    if mask.ndim == 3:  # vectors
        return F.interpolate(mask.movedim(-1, 0)[None], size, mode="nearest-exact")[0].movedim(0, -1)
    return F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]


# labels of a variant -> function of the masks of a batch
LABELS = {"true": lambda target: target, "shuffled": shuffle_masks}
