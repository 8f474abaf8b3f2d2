"""The tokens that each condition of a knockout blocks, controls included.

    incorrect, correct   B_c, and B of the correct class (see cases.py)
    random_X             as many tokens as X, drawn at random several times

Blocking any token can hurt. Random tokens avoid those of high norm, often attention sinks (Neo et al., 2410.07149),
while others are left.

Shapes: T patches.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from . import KnockoutOptions
from .cases import ConfusionCase
from .schema import SETS


def high_norm_tokens(states: Tensor) -> np.ndarray:
    """Return the tokens whose norm exceeds the mean by two standard deviations, bool[T], from states f[T, d]."""
    norm = states.float().norm(dim=-1).cpu().numpy()
    return norm > norm.mean() + 2 * norm.std()


def blocked_by_condition(
    case: ConfusionCase, high_norm: np.ndarray, plan: KnockoutOptions
) -> dict[str, list[Tensor]]:
    """Return the blocked tokens bool[T] by condition, one or several draws.

    Each draw is seeded by seed, image, class and condition, so no condition changes the draws of another.
    """
    tokens: dict[str, list[Tensor]] = {name: [case.blocked[name]] for name in SETS}
    for name in SETS:
        condition = f"random_{name}"
        rng = np.random.default_rng(
            [plan.seed, case.image, case.wrong_class, zlib.crc32(condition.encode())]
        )
        blocked = case.blocked[name].numpy()
        draws = [random_tokens(blocked, high_norm, rng) for _ in range(plan.draws)]
        tokens[condition] = [torch.from_numpy(draw) for draw in draws]
    return tokens


def random_tokens(
    blocked: np.ndarray, high_norm: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw as many tokens as are blocked, bool[T]; those of high norm only if the others do not suffice."""
    order = rng.permutation(len(blocked))
    order = order[np.argsort(high_norm[order], kind="stable")]
    return np.isin(np.arange(len(blocked)), order[: blocked.sum()])
