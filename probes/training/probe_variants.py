"""How probes are trained: a recipe. One frozen forward trains the probes of several, to see what depends on the choice.

model:
  feature_norm: none                        the main recipe is given by the arguments of `ProbeModule`,
  recipes:
    batchnorm: {feature_norm: batchnorm}    a further one names what it does otherwise
    shuffled: {labels: shuffled}
"""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from llava_bidir.common.errors import UserError
from probes.evaluation.metrics import IGNORE_INDEX

from .heads import FEATURE_NORMS, HEADS


@dataclass(frozen=True)
class ProbeVariant:
    """How the probes of all sites are trained.

    Args:
        head: linear (the paper), or another of `heads.py`.
        feature_norm: none (the paper), batchnorm or layernorm, in front of the head.
        learning_rate: Of AdamW at the start.
        labels: "true", or "shuffled": the control that trains on the masks of other images.
        seed: Of the initialisation. The order of the images is that of the run, whatever the recipe.

    Raises:
        UserError: A value that is not among those.
    """

    head: str = "linear"
    feature_norm: str = "none"
    learning_rate: float = 1e-3
    labels: str = "true"
    seed: int = 0

    def __post_init__(self):
        for key, known in (("head", HEADS), ("feature_norm", FEATURE_NORMS), ("labels", LABELS)):
            if getattr(self, key) not in known:
                raise UserError(f"unknown {key} {getattr(self, key)!r}; there is {', '.join(known)}")
        if not _is_number(self.learning_rate, float, int) or not self.learning_rate > 0:
            raise UserError(f"learning_rate must be a number above 0, got {self.learning_rate!r}")
        if not _is_number(self.seed, int):
            raise UserError(f"seed must be an integer, got {self.seed!r}")


def _is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def all_recipes(main: ProbeVariant, further: dict[str, dict[str, Any]]) -> dict[str | None, ProbeVariant]:
    """The recipes of a run by name: the main one under None, and those that say how they differ from it.

    One that equals an earlier one is left out, so that a config of recipes serves on any main one: it would train the
    same probes again, and pass for another seed.

    Raises:
        UserError: A name that cannot stand in the names of tensors, or an unknown key or value.
    """
    recipes: dict[str | None, ProbeVariant] = {None: main}
    for name, difference in further.items():
        key = f"model.recipes.{name}"
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{key}: a recipe's name is made of letters, digits, _ and -")
        known = [field.name for field in fields(ProbeVariant)]
        if not isinstance(difference, dict) or set(difference) - set(known):
            raise UserError(f"{key} must name some of {', '.join(known)} with other values, got {difference!r}")
        try:
            recipe = replace(main, **difference)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None
        if recipe in recipes.values():
            rank_zero_info(f"{key} is the same as another recipe (the main one is {main}) and is left out")
        else:
            recipes[name] = recipe
    return recipes


def probe_name(recipe: str | None, site: str) -> str:
    """What a probe is called in checkpoints, probes.safetensors and logs: the site alone in the main recipe."""
    return site if recipe is None else f"recipes/{recipe}/{site}"


def shuffled(target: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Each image gets the mask of the one before it in the batch: no image keeps its own.

    What a probe still learns is what position and class frequencies alone tell. The order of training images is drawn
    anew each epoch, and so is who stands before whom. Masks of different sizes are resized to that of the image, by
    nearest pixel. An image alone in its batch has no other mask: none of its pixels counts.

    Args:
        target: uint8[B, H, W], or a list of B masks uint8[H, W].
    """
    if len(target) == 0:
        return target
    if len(target) == 1:
        alone = target[0].new_full(target[0].shape, IGNORE_INDEX)
        return alone[None] if isinstance(target, Tensor) else [alone]
    if isinstance(target, Tensor):
        return target.roll(1, 0)
    return [_resized(other, mask.shape) for other, mask in zip([target[-1], *target[:-1]], target, strict=True)]


def _resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]


# What a recipe's probes are trained on, given the masks of a batch.
LABELS = {"true": lambda target: target, "shuffled": shuffled}
