"""Answers to questions under cut routes, and their effects with paired intervals.

Each question is its own control. Images are resampled with all their questions, for all routes and runs alike. The
interval of a cut in all layers is its own; those of windows hold for all windows of a route together.

Shapes: Q questions, K classes, T image tokens, W windows, L layers, R rows of a forward or resamplings.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, simultaneous_band
from llava_bidir.common.errors import UserError
from probes.analyses.knockout.knockout_effects import mean_over_cases
from probes.models.knockout import Knockout
from probes.runs.read import ProbeRun
from probes.score.estimate import Estimate

from . import RoutesOptions
from .questions import QuestionFile, read_question_image, tokens_in_box

CONTRAST = "object - random"
TARGETS = {  # sets of tokens of a knockout
    "question": ("question",),
    "last": ("last",),
    "text": ("question", "last", "answer"),
}
SOURCES = ("image", "object", "random", CONTRAST)
OUTCOMES = {  # of a cut: their names for all layers, and by window
    "right": ("all", "windows"),
    "changed": ("changed", "changed_windows"),
}

Tensors = dict[str, Tensor]  # content of routes.safetensors


# ------------------------------------------------------------------------------------------ cuts
def windows(width: int, layers: int, stride: int = 1) -> list[list[int]]:
    """Return the first and the last layer of each window, "all layers" first."""
    last_start = layers - width + 1
    sliding = [[first, first + width - 1] for first in range(1, last_start + 1, stride)]
    return [[1, layers], *sliding]


def layers_cut(places: Sequence[Sequence[int]], layers: int) -> Tensor:
    """Return the layers from the first to the last of each place, bool[1 + W, L]."""
    numbers = torch.arange(1, layers + 1)
    return torch.stack([(numbers >= first) & (numbers <= last) for first, last in places])


def random_patches(place: Tensor, draws: int, seed: list[int]) -> Tensor:
    """Return as many random patches outside of an object's bool[T] as it has, bool[draws, T].

    Where these are too few, some of the object's own, which makes a difference smaller.
    """
    outside = (~place).nonzero().flatten().numpy()
    inside = place.nonzero().flatten().numpy()
    count = min(len(inside), len(outside))
    rng = np.random.default_rng(seed)
    random = torch.zeros(draws, len(place), dtype=torch.bool)
    for drawn in random:
        drawn[torch.from_numpy(rng.choice(outside, count, replace=False))] = True
        if count < len(inside):
            rest = rng.choice(inside, len(inside) - count, replace=False)
            drawn[torch.from_numpy(rest)] = True
    return random


class Asker:
    """Asks the model of a run questions, as it is and under cuts.

    Args:
        run: The run.
        options: What to cut.
        file: The questions.
    """

    def __init__(self, run: ProbeRun, options: RoutesOptions, file: QuestionFile):
        self.mllm = run.mllm()
        self.probes = {site: probe.to(self.mllm.device) for site, probe in run.probes().items()}
        self.classes = run.metrics["classes"]
        self.options = options
        self.file = file
        self.layers = len(self.mllm.layers)
        self.places = windows(options.window, self.layers, options.stride)

    def ask(self, numbers: Sequence[int]) -> Tensors:
        """Return the results of some questions of the file, by key of routes.safetensors."""
        results = [self._ask(number) for number in numbers]
        return {key: torch.stack([result[key] for result in results]) for key in results[0]}

    def _ask(self, number: int) -> Tensors:
        question = self.file.questions[number]
        name = self.file.images[question.image]
        image = read_question_image(self.options.images, name)
        pixels = self.mllm.preprocess([image])
        place = tokens_in_box(self.mllm.geometry, (image.height, image.width), question.box)
        if place.all():
            raise UserError(
                f"{self.options.questions}: the place of {question.text!r} is all of {name}; expected a part"
            )
        none = self._scores(pixels, question.text)[0]
        results = {
            "image": torch.tensor(question.image),
            "right": torch.tensor(question.right),
            "none": none,
        }
        for site, states in self.mllm.states(pixels, [*self.probes]).items():
            logits = self.probes[site](states.float())[0].cpu()
            results[f"probe:{site}"] = logits[place].mean(0).log_softmax(-1)
        sources = {
            "image": torch.ones_like(place)[None],
            "object": place[None],
            "random": random_patches(place, self.options.draws, [self.options.seed, number]),
        }
        cut = layers_cut(self.places, self.layers)
        patches = torch.cat([*sources.values()])
        layers = cut.repeat(len(patches), 1)
        blocked = patches.repeat_interleave(len(cut), 0)
        for target, rows in TARGETS.items():
            scores = self._cut(
                pixels, text=question.text, rows=rows, layers=layers, blocked=blocked
            )
            by_source = scores.unflatten(0, (-1, len(cut))).split([*map(len, sources.values())])
            for source, of_source in zip(sources, by_source, strict=True):
                results |= outcomes(
                    f"{source} to {target}", scores=of_source, none=none, right=question.right
                )
        return results

    def _scores(self, pixels: Tensor, text: str, knockout: Knockout | None = None) -> Tensor:
        """Return the log-probability of each class as the answer, f[R, K], normalised over classes."""
        scores = self.mllm.answer_log_probs(
            pixels, question=text, answers=self.classes, knockout=knockout
        )
        return scores.log_softmax(-1)

    def _cut(
        self, pixels: Tensor, text: str, rows: tuple[str, ...], layers: Tensor, blocked: Tensor
    ) -> Tensor:
        """Return the same under R knockouts, f[R, K], in layers bool[R, L] and of patches bool[R, T]."""
        scores = []
        size = self.options.batch_size
        for of_layers, of_blocked in zip(layers.split(size), blocked.split(size), strict=True):
            knockout = Knockout(of_blocked, of_layers, rows)
            of_rows = pixels.expand(len(of_layers), -1, -1, -1)
            scores.append(self._scores(of_rows, text, knockout))
        return torch.cat(scores)


def outcomes(route: str, scores: Tensor, none: Tensor, right: int) -> Tensors:
    """Return the outcomes of a route, f[1 + W] each, means over draws of scores f[draws, 1 + W, K]."""
    answers = scores.argmax(-1)
    of_right = scores[..., right]
    by_outcome = {
        "right": of_right,
        "probability": of_right.exp(),
        "changed": (answers != none.argmax()).float(),
        "correct": (answers == right).float(),
    }
    return {f"{outcome}:{route}": values.mean(0) for outcome, values in by_outcome.items()}


# ------------------------------------------------------------------------------------------ effects
def mean_over_questions(tensors: Tensors, values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the mean of values f[Q, ...], and those under resampling of the images."""
    images = tensors["image"]
    weights = bootstrap_weights(int(images.max()) + 1, seed=seed)
    return mean_over_cases(values, images, weights)


def answer_statistics(tensors: Tensors, sites: Sequence[str], seed: int) -> dict[str, Any]:
    """Return how many answers are right, beside the probes at the same places.

    Args:
        tensors: Content of routes.safetensors.
        sites: Sites of the probes.
        seed: Seed of the bootstrap.

    Returns:
        {"questions", "images": numbers, "accuracy", "sites": [{"site", "accuracy", "difference": answer minus probe,
        "agreement": share of questions on which both say the same}]}; values with intervals are {"value", "ci95"}.
    """

    def entry(values: Tensor, lowest: float = 0.0) -> dict[str, Any]:
        mean, resampled = mean_over_questions(tensors, values, seed)
        return Estimate(mean.item(), resampled).json(lowest=lowest, highest=1.0)

    answered = tensors["none"].argmax(-1)
    is_right = (answered == tensors["right"]).double()
    of_sites = []
    for site in sites:
        read = tensors[f"probe:{site}"].argmax(-1)
        probe_is_right = (read == tensors["right"]).double()
        of_sites.append(
            {
                "site": site,
                "accuracy": entry(probe_is_right),
                "difference": entry(is_right - probe_is_right, -1.0),
                "agreement": entry(answered == read),
            }
        )
    return _counts(tensors) | {"accuracy": entry(is_right), "sites": of_sites}


def _counts(tensors: Tensors) -> dict[str, int]:
    images = tensors["image"]
    return {"images": len(images.unique()), "questions": len(images)}


def route_effects(
    tensors: Tensors, places: Sequence[Sequence[int]], seed: int
) -> list[dict[str, Any]]:
    """Return the effects of all routes.

    Args:
        tensors: Content of routes.safetensors.
        places: First and last layer of each cut, all layers first.
        seed: Seed of the bootstrap.

    Returns:
        [{"source", "target", "all", "windows", "changed", "changed_windows", "right"}]. "all", "changed" and "right"
        are {"value", "ci95"} of a cut in all layers: in nats, and as the shares of answers that change and that are
        right; the lists have one of these with "layers" for each window. The source "object - random" is the
        difference of the two.
    """
    effects = []
    for target, source in product(TARGETS, SOURCES):
        effect: dict[str, Any] = {"source": source, "target": target}
        for outcome, (of_all, by_window) in OUTCOMES.items():
            values = change(tensors, outcome=outcome, source=source, target=target)
            mean, resampled = mean_over_questions(tensors, values, seed)
            effect[of_all] = Estimate(mean[0].item(), resampled[:, 0]).json()
            layers = [{"layers": list(place)} for place in places[1:]]
            effect[by_window] = band_entries(layers, mean[1:], resampled[:, 1:])
        correct = change(tensors, outcome="correct", source=source, target=target)[:, 0]
        mean, resampled = mean_over_questions(tensors, correct, seed)
        effect["right"] = Estimate(mean.item(), resampled).json()
        effects.append(effect)
    return effects


def change(tensors: Tensors, outcome: str, source: str, target: str) -> Tensor:
    """Return an outcome when a route is cut, f[Q, 1 + W]: "right" in nats more, "changed", or "correct"."""
    if source == CONTRAST:
        of_object, of_random = (
            change(tensors, outcome=outcome, source=name, target=target)
            for name in CONTRAST.split(" - ")
        )
        return of_object - of_random
    values = tensors[f"{outcome}:{source} to {target}"].double()
    if outcome != "right":
        return values
    none = tensors["none"].gather(1, tensors["right"][:, None]).double()
    return values - none


def band_entries(
    places: Sequence[dict[str, Any]], values: Tensor, resampled: Tensor
) -> list[dict[str, Any]]:
    """Return each place with its value f[P], and an interval from f[R, P] that holds for all places together."""
    low, high = simultaneous_band(values, resampled)
    return [
        place | {"value": values[i].item(), "ci95": [low[i].item(), high[i].item()]}
        for i, place in enumerate(places)
    ]


def claimed_routes(tensors: Tensors, seed: int) -> dict[str, Estimate]:
    """Return the number of the claim: how much less probable the answer is without its object than without others."""
    without_object, without_random = (
        tensors[f"probability:{name} to text"][:, 0].double() for name in CONTRAST.split(" - ")
    )
    mean, resampled = mean_over_questions(tensors, without_random - without_object, seed)
    return {"route_object": Estimate(mean.item(), resampled, {"n": _counts(tensors)})}
