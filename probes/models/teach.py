"""Teach an MLLM's sites a concept from painted patches: the probes, their scores by site and their maps.

Such a probe is a concept activation vector (Kim et al. 2018), one per site, read at every patch.

Shapes: h w patch grid, T = h w patches, N painted patches, K concepts, P photos, d width of a site.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llava_bidir.common.arguments import check_is_list
from llava_bidir.common.errors import UserError
from llava_bidir.common.image_io import PhotoLike, as_photo
from llava_bidir.common.quantiles import student_quantile
from probes.ops.geometry import Geometry, mask_tensor

from .concept_folds import Folds, Paint, make_folds
from .concept_probes import ConceptProbes, solve_concepts
from .knockout import Knockout
from .random_init import random_layers

if TYPE_CHECKING:
    import pandas as pd

BACKGROUND = "background"
MOST_REST = 300  # patches that stand for the unpainted rest of all photos, evenly spaced
FEWEST_PHOTOS = 5  # for an interval over photos

Painted = Mapping[str, Sequence[tuple[PhotoLike, np.ndarray | Tensor]]]


class Taught:
    """Probes of painted concepts at all sites of an MLLM, from :meth:`FrozenMLLM.teach`.

    Attributes:
        concepts: Names of the concepts; the last one is "background" if the rest is.
        photos: The painted photos.
        paint: The painted patches.
        probes: The probes.
        note: What the scores can and cannot tell.
    """

    def __init__(self, mllm: nn.Module, painted: Painted, rest_is_background: bool = False):
        self.mllm = mllm
        self.concepts, self.photos, grids = _read_painted(painted, mllm.geometry)
        if rest_is_background:
            if BACKGROUND in self.concepts:
                raise UserError(
                    "a concept is called 'background', and so is the rest; rename it, or leave rest_is_background out"
                )
            self.concepts.append(BACKGROUND)
        self.paint = paint_of(grids, len(self.concepts), rest_is_background)
        self._states = self._read_states()
        _, photo_width = mllm.grid
        folds = make_folds(self.paint, photo_width)
        self.probes = solve_concepts(self._states, self.paint, folds)
        self.note = describe_folds(self.probes)
        if not self.probes.folds.by_photo:
            warnings.warn(self.note, stacklevel=3)

    def curve(self, knockout: Knockout | None = None) -> "pd.DataFrame":
        """Return the score of each site on left-out patches, with columns site, score, low, high and chance.

        The score is the mean over concepts of the share of their patches that are right. `low` and `high` are a 95%
        interval over photos, NaN if there are too few to say.

        Args:
            knockout: Attention knockout bool[1, T] of each photo, under which the same probes are read.
        """
        states = self._states
        if knockout is not None:
            states = self._read_states(knockout)
        return score_sites(self.probes, states)

    def random_curve(self, draw: int = 0) -> "pd.DataFrame":
        """Return the curve of new probes on states of a random LLM that is matched to the trained one.

        Concepts that such an LLM tells as well have not been learned by its layers.

        Raises:
            UserError: As :func:`probes.models.random_init.random_layers`.
        """
        with random_layers(self.mllm, draw=draw, match_images=self.photos):
            states = self._read_states()
        random_probes = solve_concepts(states, self.paint, self.probes.folds)
        return score_sites(random_probes, states)

    def map(self, image: PhotoLike, site: str, knockout: Knockout | None = None) -> Tensor:
        """Return the probability of each concept at each patch of any image, f32[K, h, w].

        Raises:
            UserError: The site is unknown, or the knockout does not fit the model.
        """
        pixels = self.mllm.preprocess(image)
        by_site = self.mllm.states(pixels, [site], knockout)
        states = by_site[site][0]
        probability = self.probes.logits(states, site).softmax(-1)
        return probability.T.unflatten(1, self.mllm.grid).cpu()

    def _read_states(self, knockout: Knockout | None = None) -> dict[str, Tensor]:
        """Return the states f[N, d] of the painted patches at all sites."""
        by_photo = []
        for photo in self.photos:
            pixels = self.mllm.preprocess([photo])
            by_photo.append(self.mllm.states(pixels, None, knockout))
        return painted_states(self.paint, by_photo)


def paint_of(grids: Sequence[Tensor], concepts: int, rest_is_background: bool) -> Paint:
    """Return the painted patches of photos.

    Args:
        grids: Concept of each patch of each photo, i64[T], -1 where nothing is painted.
        concepts: K, with the background if the rest is.
        rest_is_background: Of the other patches of these photos, up to `MOST_REST` evenly spaced ones are the last
            concept.

    Raises:
        UserError: There are fewer than two concepts, or one has no patch.
    """
    painted = torch.stack([grid.clone() for grid in grids])
    if rest_is_background:
        rest = (painted < 0).nonzero()
        count = min(len(rest), MOST_REST)
        evenly = torch.linspace(0, len(rest) - 1, count)
        photo, patch = rest[evenly.round().long()].T
        painted[photo, patch] = concepts - 1
    photo, patch = (painted >= 0).nonzero().T
    paint = Paint(painted[photo, patch], photo, patch)
    if concepts < 2:
        raise UserError(
            "one concept is right everywhere; paint another one, or let the rest be background"
        )
    counts = paint.concept.bincount(minlength=concepts).tolist()
    if 0 in counts:
        number = counts.index(0) + 1
        raise UserError(f"concept {number} of {concepts} has no patch; paint at least one")
    return paint


def painted_states(paint: Paint, by_photo: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the states f[N, d] of painted patches by site, from those f[1, T, d] of each photo, on the CPU."""
    painted = {}
    for site in by_photo[0]:
        states = torch.stack([of_photo[site][0] for of_photo in by_photo])
        painted[site] = states[paint.photo, paint.patch].cpu()
    return painted


def score_sites(probes: ConceptProbes, states: Mapping[str, Tensor]) -> "pd.DataFrame":
    """Return the curve of :meth:`Taught.curve` from states f[N, d] of the painted patches."""
    import pandas as pd

    paint = probes.paint
    concepts = int(paint.concept.max()) + 1
    rows = []
    for site, x in states.items():
        score, low, high = (np.nan, np.nan, np.nan)
        if probes.folds.of is not None:
            right = probes.left_out(x, site) == paint.concept
            score, low, high = _score(
                right,
                paint,
                concepts,
                probes.folds,
            )
        row = {
            "site": site,
            "score": score,
            "low": low,
            "high": high,
            "chance": 1 / concepts,
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=["site", "score", "low", "high", "chance"])


def _score(
    right: Tensor,
    paint: Paint,
    concepts: int,
    folds: Folds,
) -> tuple[float, float, float]:
    """Return mean accuracy of the concepts, and its 95% interval over photos: the jackknife with Student's t.

    Probes of different folds have seen the same photos, so the variance is multiplied by 1 + F / (F - 1) for F folds.
    If no photo differs from the others, each bound leaves room for the share of photos that could: the exact interval
    of a proportion that was 0 of P.

    Source: Nadeau and Bengio, Inference for the Generalization Error, 2003; Clopper and Pearson 1934.
    """
    photos = int(paint.photo.max()) + 1
    # f64[P, K], patches
    correct = torch.zeros(photos, concepts, dtype=torch.float64)
    painted = torch.zeros(photos, concepts, dtype=torch.float64)
    place = (paint.photo, paint.concept)
    correct.index_put_(place, right.double(), accumulate=True)
    painted.index_put_(place, torch.ones_like(right).double(), accumulate=True)
    all_correct = correct.sum(0)
    all_painted = painted.sum(0)
    score = (all_correct / all_painted).mean().item()
    if not folds.by_photo or photos < FEWEST_PHOTOS:
        return score, np.nan, np.nan
    # f64[P, K], accuracy without each photo
    accuracy_without = (all_correct - correct) / (all_painted - painted)
    without = accuracy_without.mean(-1)
    squares = (without - without.mean()).square()
    variance = (photos - 1) * squares.mean().item()
    count = int(folds.of.max()) + 1
    overlap = 1 + count / (count - 1)
    half = student_quantile(0.975, photos - 1) * (variance * overlap) ** 0.5
    if (without == without[0]).all():
        half = 1 - 0.025 ** (1 / photos)
    low = max(0.0, score - half)
    high = min(1.0, score + half)
    return score, low, high


def describe_folds(probes: ConceptProbes) -> str:
    """Return what the scores can and cannot tell, "" if nothing stands in their way."""
    photos = int(probes.paint.photo.max()) + 1
    if probes.folds.of is None:
        return "A concept has a single patch, so that none can be left out: there is no score. Paint more."
    if not probes.folds.by_photo:
        which = "There is one photo" if photos == 1 else "A concept is painted on one photo only"
        return (
            f"{which}: the score is of patches left out of the same photo. Patches of one photo resemble each other, "
            "so it says little about other photos. Paint each concept on another one."
        )
    if photos < FEWEST_PHOTOS:
        return f"{photos} photos are too few to say how much the score varies between photos; {FEWEST_PHOTOS} will do."
    return ""


def _read_painted(
    painted: Painted, geometry: Geometry
) -> tuple[list[str], list[Image.Image], list[Tensor]]:
    """Return concepts, photos and the concept of each patch of each photo, i64[T].

    Photos with the same pixels are one photo.

    Raises:
        UserError: Something is not an image or not a grid of patches, or a patch is painted as two concepts.
    """
    if not isinstance(painted, Mapping):
        raise UserError(
            f"expected {{'road': [(image, patches), ...], ...}}, got {type(painted).__name__}"
        )
    names = list(painted)
    images: dict[tuple, Image.Image] = {}
    concepts: dict[tuple, Tensor] = {}  # i64[T], -1 where nothing is painted
    for k, name in enumerate(names):
        pairs = painted[name]
        check_is_list(f"concept {name!r}", pairs, "[(image, patches), ...]")
        if not pairs:
            raise UserError(
                f"concept {name!r} has no photo; expected pairs of an image and its painted patches"
            )
        for pair in pairs:
            image, mine = _read_pair(name, pair, geometry)
            content = hashlib.sha256(image.tobytes()).digest()
            key = (image.size, image.mode, content)
            images.setdefault(key, image)
            concept = concepts.setdefault(key, torch.full((mine.numel(),), -1))
            is_taken = mine & (concept >= 0) & (concept != k)
            if is_taken.any():
                patch = int(is_taken.nonzero()[0])
                other = names[int(concept[patch])]
                raise UserError(f"patch {patch} of a photo is painted as {other!r} and {name!r}")
            concept[mine] = k
    grids = list(concepts.values())
    for k, name in enumerate(names):
        is_painted = any((concept == k).any() for concept in grids)
        if not is_painted:
            raise UserError(f"concept {name!r} has no painted patch; paint at least one")
    if not names:
        raise UserError("got no concepts; expected {'road': [(image, patches), ...], ...}")
    return names, list(images.values()), grids


def _read_pair(name: str, pair: Any, geometry: Geometry) -> tuple[Image.Image, Tensor]:
    """Return the photo and the painted patches bool[T] of a pair.

    Raises:
        UserError: It is not a pair of an image and a grid of patches, or of pixels.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UserError(
            f"concept {name!r}: expected pairs of an image and its painted patches, got {pair!r:.80}"
        )
    image, patches = pair
    if not isinstance(patches, np.ndarray | Tensor | list):
        kind = type(patches).__name__
        raise UserError(f"concept {name!r}: expected painted patches as an array, got {kind}")
    patches = mask_tensor(patches)
    if not isinstance(image, PhotoLike):
        kind = type(image).__name__
        raise UserError(
            f"concept {name!r}: expected a PIL image or the path of a photo, got {kind}"
        )
    image = as_photo(image)
    size = (image.height, image.width)
    shape = tuple(patches.shape)
    if patches.dtype != torch.bool or shape not in (geometry.grid, size):
        dtype = str(patches.dtype).removeprefix("torch.")
        raise UserError(
            f"concept {name!r}: expected painted patches bool{list(geometry.grid)}, or pixels of the photo "
            f"bool{list(size)}, got {dtype}{list(shape)}"
        )
    if shape != geometry.grid:
        patches = geometry.patches(patches) > 0.5
    return image, patches.flatten()
