"""The tokens that each condition of a knockout blocks, controls included.

    incorrect, correct   B_c, and B of the correct class (see cases.py)
    random_X             as many tokens as X, drawn at random
    matched_X            as many, matched to X in distance to the mistaken patches and in the attention that they
                         receive from these

Blocking any token can hurt, nearby or highly attended ones more. An effect is class-specific only if it exceeds the
matched controls. Controls avoid tokens of high norm, often attention sinks (Neo et al., 2410.07149), and matched
controls avoid tokens of X, while others are left. Conditions with random tokens are drawn several times.

For matched_X, distance and attention are ranks among the image's tokens: ranks put both on one scale, which a few
attention sinks cannot stretch (rank-based distance; Rosenbaum, Design of Observational Studies, 2010, ch. 8). A token
that no mistaken patch sees receives no attention.

Shapes: T patches on a grid h x w, L layers.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from . import KnockoutOptions
from .cases import ConfusionCase
from .schema import SETS

MATCH_CANDIDATES = 3  # a matched token is drawn from the best matches, so that draws differ


class MatchingFeatures(NamedTuple):
    """Features of each token by which controls are matched, for one case."""

    distance: np.ndarray  # f[T], distance to the nearest mistaken patch, in patches
    mass: np.ndarray | None  # f[T], attention received per mistaken patch; None if not measured
    high_norm: np.ndarray  # bool[T]

    @classmethod
    def from_case(
        cls,
        case: ConfusionCase,
        grid: tuple[int, int],
        states: Tensor,
        attention: Tensor | None,
    ) -> "MatchingFeatures":
        """Compute the features from adapter states f[T, d] and the attention f[L, T] that the mistaken patches pay."""
        at = np.stack(np.unravel_index(np.arange(len(case.mistaken)), grid), 1)
        mistaken = case.mistaken.numpy()
        apart = at[:, None] - at[mistaken][None]
        distance = np.linalg.norm(apart, axis=-1).min(1)
        mass = None if attention is None else attention.mean(0).cpu().numpy()
        return cls(distance, mass, high_norm_tokens(states))


def high_norm_tokens(states: Tensor) -> np.ndarray:
    """Return the tokens whose norm exceeds the mean by two standard deviations, bool[T], from states f[T, d]."""
    norm = states.float().norm(dim=-1).cpu().numpy()
    return norm > norm.mean() + 2 * norm.std()


def blocked_by_condition(
    case: ConfusionCase, features: MatchingFeatures, plan: KnockoutOptions
) -> dict[str, list[Tensor]]:
    """Return the blocked tokens bool[T] by condition, one or several draws.

    Each draw is seeded by seed, image, class and condition, so no condition changes the draws of another.
    """

    def draw(condition: str, sample: Callable[..., np.ndarray], *args) -> list[Tensor]:
        rng = np.random.default_rng(
            [plan.seed, case.image, case.wrong_class, zlib.crc32(condition.encode())]
        )
        return [torch.from_numpy(sample(*args, rng)) for _ in range(plan.draws)]

    sets = {name: case.blocked[name].numpy() for name in SETS}
    tokens: dict[str, list[Tensor]] = {name: [case.blocked[name]] for name in SETS}
    for name, blocked in sets.items():
        tokens[f"random_{name}"] = draw(
            f"random_{name}", random_tokens, blocked, features.high_norm
        )
    if "matched" in plan.controls:
        values = rankdata(np.stack([features.distance, features.mass], 1), axis=0)
        for name, blocked in sets.items():
            condition = f"matched_{name}"
            tokens[condition] = draw(condition, matched_tokens, values, blocked, features.high_norm)
    return tokens


def random_tokens(
    blocked: np.ndarray, high_norm: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw as many tokens as are blocked, bool[T]; those of high norm only if the others do not suffice."""
    order = rng.permutation(len(blocked))
    order = order[np.argsort(high_norm[order], kind="stable")]
    return np.isin(np.arange(len(blocked)), order[: blocked.sum()])


def matched_tokens(
    values: np.ndarray,
    blocked: np.ndarray,
    avoided: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw for each blocked token a different one with similar values f[T, F], without replacement, bool[T].

    Avoided tokens are drawn only if no others are left, and the blocked tokens themselves come last.
    """
    pools = [~blocked & ~avoided, ~blocked & avoided, blocked.copy()]
    taken = np.zeros_like(blocked)
    for token in rng.permutation(np.flatnonzero(blocked)):
        pool = np.flatnonzero(next(candidates for candidates in pools if candidates.any()))
        distance = np.linalg.norm(values[pool] - values[token], axis=-1)
        nearest = np.lexsort((rng.random(len(pool)), distance))[:MATCH_CANDIDATES]
        pick = rng.choice(pool[nearest])
        taken[pick] = True
        for candidates in pools:
            candidates[pick] = False
    return taken
