"""Probes of the concepts that are painted in the lab: solved from kept states of the photos, and scored.

Shapes: T image tokens, N painted patches, K concepts, d width.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.models.concept_folds import Paint, make_folds
from probes.models.concept_probes import ConceptProbes, solve_concepts
from probes.models.random_init import random_layers
from probes.models.teach import describe_folds, paint_of, painted_states, score_sites

from .models import LabModel, check_patches
from .photos import Photos
from .requests import Painting, Teach, View
from .worker import Job

KEPT = 8  # probes of paintings: those of the last strokes, by model


class Teacher:
    """Probes of paintings; the last ones are kept, so that maps of all photos come from one solution.

    Args:
        models: The models.
        photos: The photos.
        read_states: Returns the states f[1, T, d] of a view by site.
    """

    def __init__(
        self,
        models: list[LabModel],
        photos: Photos,
        read_states: Callable[[View, Job], dict[str, Tensor]],
    ):
        self.models = models
        self.photos = photos
        self._read_states = read_states
        self._probes: OrderedDict[tuple[int, Painting], ConceptProbes] = OrderedDict()

    def paint(self, request: View) -> Paint:
        """Return the painted patches of a request.

        Raises:
            UserError: A patch is not in the grid, or there are fewer than two concepts, or one has no patch.
        """
        model = self.models[request.model]
        painting = request.painting
        grids = []
        for photo in painting.photos:
            grid = torch.full((model.mllm.image_tokens,), -1)
            for k, patches in enumerate(photo.patches):
                check_patches(model, patches)
                grid[list(patches)] = k
            grids.append(grid)
        return paint_of(grids, len(painting.concepts) + painting.rest, painting.rest)

    def probes(self, request: View, job: Job) -> ConceptProbes:
        """Return the probes of a painting, which do not depend on the intervention."""
        key = request.model, request.painting
        if key not in self._probes:
            paint = self.paint(request)
            grid = self.models[request.model].mllm.grid
            states = self._states(request.model_copy(update={"intervention": None}), paint, job)
            self._probes[key] = solve_concepts(states, paint, make_folds(paint, grid[1]), job.check)
            if len(self._probes) > KEPT:
                self._probes.popitem(last=False)
        self._probes.move_to_end(key)
        return self._probes[key]

    def score(self, request: Teach, job: Job) -> dict[str, Any]:
        """Return the scores of the probes by site, [score, low, high] or nulls, and what they can tell.

        `random` scores probes of a random LLM instead, matched to the trained one on the painted photos.
        """
        probes = self.probes(request, job)
        if request.random:
            states = self._random_states(request, probes.paint, job)
            probes = solve_concepts(states, probes.paint, probes.folds, job.check)
        else:
            states = self._states(request, probes.paint, job)
        curve = score_sites(probes, states)
        rows = curve[["score", "low", "high"]].to_numpy().tolist()
        scores = [[None if np.isnan(x) else x for x in row] for row in rows]
        summary = {
            "chance": float(curve.chance[0]),
            "patches": len(probes.paint.patch),
            "note": describe_folds(probes),
        }
        return {"scores": scores, **summary}

    def _states(self, request: View, paint: Paint, job: Job) -> dict[str, Tensor]:
        """Return the states f[N, d] of the painted patches by site, of all photos under the intervention."""
        views = [
            request.model_copy(update={"photo": photo.photo}) for photo in request.painting.photos
        ]
        return painted_states(paint, [self._read_states(view, job) for view in views])

    def _random_states(self, request: View, paint: Paint, job: Job) -> dict[str, Tensor]:
        """Return the states f[N, d] of the painted patches under a random LLM."""
        model = self.models[request.model]
        squares = [
            self.photos.get(photo.photo).squares[request.model] for photo in request.painting.photos
        ]
        with job.watched(model.mllm), random_layers(model.mllm, match_images=squares):
            return painted_states(
                paint, [model.mllm.states(model.mllm.preprocess([x]), model.sites) for x in squares]
            )
