"""What is blocked in each condition of a knockout, controls included.

    incorrect, correct   B_c, and B of the correct class (see knockout_cases.py)
    random_X             as many tokens as in X, drawn at random
    distance_X           as many, like those of X in distance to the mistaken patches and in how many of these see them
    mass_X               as many, like those of X in the attention that they get from the mistaken patches
    high_norm            the image's tokens of unusually high norm, often attention sinks (Neo et al., 2410.07149)
    X@F                  a random fraction F of X: dose and response
    only_X               the reverse: every image token attends to X, to itself and to no other image token
    only_random_X        the same with as many random tokens

Blocking any token may hurt, and a near or much-regarded one more; so an effect speaks of a class only if it is not that
of a control. No control takes a token of high norm while there are others, and those that are matched take none of X
while there are others (`balance` tells how well that went). A condition that draws does so several times.

Shapes: T patches on a grid h x w, L layers.
"""

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.models.knockout import all_but

from .cases import ConfusionCase

CONDITIONS = ("none", "incorrect", "correct", "random_incorrect", "random_correct")  # there in every knockout
SETS = ("incorrect", "correct")
CONTROLS = ("random", "distance", "mass")  # "random" is always there
BALANCE = ("size", "distance", "seen", "mass", "overlap")
AMONG = 3  # a matched token is one of so many that match best, so that draws differ


class MatchingFeatures(NamedTuple):
    """What controls are matched in, for one case.

    Args:
        distance: f[T], of each token to the nearest mistaken patch, in patches.
        seen: f[T], the share of mistaken patches that the mask lets attend to it.
        mass: f[T], the attention that it gets from a mistaken patch, over the unmodified model's layers and heads; NaN
            where it was not asked for.
        high_norm: bool[T].
    """

    distance: np.ndarray
    seen: np.ndarray
    mass: np.ndarray
    high_norm: np.ndarray

    @classmethod
    def of(
        cls, case: ConfusionCase, grid: tuple[int, int], visible: Tensor, states: Tensor, mass: Tensor | None
    ) -> "MatchingFeatures":
        """From `visible` bool[T, T] (who may attend to whom), the adapter's states f[T, d] and `mass` f[T]."""
        at = np.stack(np.unravel_index(np.arange(len(case.mistaken)), grid), 1)
        mistaken = case.mistaken.numpy()
        distance = np.linalg.norm(at[:, None] - at[mistaken][None], axis=-1).min(1)
        norm = states.float().norm(dim=-1).cpu().numpy()
        mass = np.full(len(at), np.nan) if mass is None else mass.cpu().numpy()
        seen = visible.cpu().numpy()[mistaken].mean(0)
        return cls(distance, seen, mass, norm > norm.mean() + 2 * norm.std())


def conditions(
    case: ConfusionCase,
    around: MatchingFeatures,
    controls: list[str],
    draws: int,
    doses: list[float],
    reverse: bool,
    seed: int,
) -> dict[str, list[Tensor]]:
    """What is blocked by condition, one or several draws of it: bool[T], or bool[T, T] for the reverse.

    Each condition draws by itself, by seed, image and class: none changes another's draws.
    """

    def drawn(name: str, draw) -> list[Tensor]:
        rng = np.random.default_rng([seed, case.image, case.wrong_class, zlib.crc32(name.encode())])
        return [torch.from_numpy(draw(rng)) for _ in range(draws)]

    found: dict[str, list[Tensor]] = {name: [case.blocked[name]] for name in SETS}
    for name in SETS:
        blocked = case.blocked[name].numpy()
        found[f"random_{name}"] = drawn(f"random_{name}", lambda rng, b=blocked: random_tokens(b, around, rng))
    for control in CONTROLS[1:]:
        features = _features(around, control)
        for name in SETS if control in controls else ():
            b = case.blocked[name].numpy()
            draw = lambda rng, b=b, f=features: matched_tokens(f, b, around.high_norm, rng)
            found[f"{control}_{name}"] = drawn(f"{control}_{name}", draw)
    if "high_norm" in controls:
        found["high_norm"] = [torch.from_numpy(around.high_norm)]
    for dose in doses:
        for name in SETS:
            b = case.blocked[name].numpy()
            found[f"{name}@{dose:g}"] = drawn(f"{name}@{dose:g}", lambda rng, b=b, dose=dose: fraction(b, dose, rng))
    for name in (*SETS, *(f"random_{name}" for name in SETS)) if reverse else ():
        found[f"only_{name}"] = [all_but(kept[None])[0] for kept in found[name]]
    return found


def random_tokens(blocked: np.ndarray, around: MatchingFeatures, rng: np.random.Generator) -> np.ndarray:
    """As many tokens as are blocked, drawn from all but those of high norm while these suffice, bool[T]."""
    order = rng.permutation(len(blocked))
    order = order[np.argsort(around.high_norm[order], kind="stable")]
    return np.isin(np.arange(len(blocked)), order[: blocked.sum()])


def matched_tokens(
    features: np.ndarray, blocked: np.ndarray, barred: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """For each blocked token another that has nearly its features, each taken once, bool[T].

    Args:
        features: f[T, F].
        blocked: bool[T].
        barred: bool[T], tokens that are taken only when there are no others, and before those that are blocked.
        rng: In what order tokens are matched, and to which of the `AMONG` nearest.
    """
    free, taken = [~blocked & ~barred, ~blocked & barred, blocked.copy()], np.zeros_like(blocked)
    for token in rng.permutation(np.flatnonzero(blocked)):
        pool = np.flatnonzero(next(candidates for candidates in free if candidates.any()))
        apart = np.linalg.norm(features[pool] - features[token], axis=-1)
        pick = rng.choice(pool[np.lexsort((rng.random(len(pool)), apart))[:AMONG]])
        taken[pick] = True
        for candidates in free:
            candidates[pick] = False
    return taken


def fraction(blocked: np.ndarray, dose: float, rng: np.random.Generator) -> np.ndarray:
    """A random `dose` of the blocked tokens, to the nearest whole one, bool[T]."""
    tokens = rng.permutation(np.flatnonzero(blocked))
    return np.isin(np.arange(len(blocked)), tokens[: round(dose * len(tokens))])


def balance(case: ConfusionCase, around: MatchingFeatures, name: str, draws: list[Tensor]) -> Tensor:
    """How many tokens a condition blocks, their mean distance, mean share of mistaken patches that see them, summed
    attention mass, and the share that is in the set that it is to be compared with: f[5], NaN where there is none.
    """
    of = case.blocked.get(name.split("@")[0].rpartition("_")[2], torch.zeros_like(case.mistaken)).numpy()
    rows = []
    for draw in draws:
        b = draw.numpy()
        if b.ndim == 2 or not b.any():  # of the reverse, each token blocks others
            rows.append([b.sum() if b.ndim == 1 else np.nan] + [np.nan] * 4)
        else:
            mean = lambda x, b=b: x[b].mean()
            rows.append([b.sum(), mean(around.distance), mean(around.seen), around.mass[b].sum(), mean(of)])
    return torch.tensor(np.mean(rows, 0), dtype=torch.float32)


def _features(around: MatchingFeatures, control: str) -> np.ndarray:
    """What tokens are matched in, f[T, F]; to be seen by none or by all counts as much as the image's whole extent."""
    if control == "mass":
        return around.mass[:, None]
    return np.stack([around.distance, around.seen * max(around.distance.max(), 1)], 1)
