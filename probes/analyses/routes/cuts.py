"""Answers to questions under cut routes, and their effects with paired intervals.

Each question is its own control. Images are resampled with all their questions, for all routes and runs alike. The
interval of a cut in all layers is its own; those of windows hold for all windows of a route together.

Shapes: Q questions, K classes, T image tokens, W windows, L layers, R rows of a forward or resamplings.
"""

from collections.abc import Sequence
from itertools import product
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, simultaneous_band
from llava_bidir.common.errors import UserError
from probes.analyses.knockout.knockout_effects import mean_over_cases
from probes.data.blank import blank_picture
from probes.models.knockout import Knockout
from probes.runs.read import ProbeRun
from probes.score.estimate import Estimate, EstimateEntry

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


class BandEntry(EstimateEntry, total=False):
    """A number at a place, with an interval that holds for all places together."""

    layer: int  # of patching
    layers: list[int]  # of routes: the first and the last one


class SiteAnswers(TypedDict):
    """How often the probe at a site is right."""

    site: str
    accuracy: EstimateEntry
    difference: EstimateEntry  # answer minus probe
    agreement: EstimateEntry  # share of questions on which both say the same


class AnswerStatistics(TypedDict):
    """How often answers are right."""

    images: int
    questions: int
    accuracy: EstimateEntry
    sites: list[SiteAnswers]


class RouteEffect(TypedDict):
    """What a cut changes: in all layers, and by window."""

    source: str  # "object - random" is the difference of the two
    target: str
    all: EstimateEntry  # nats
    windows: list[BandEntry]
    changed: EstimateEntry  # share of answers
    changed_windows: list[BandEntry]
    right: EstimateEntry  # share of answers under the cut in all layers


class RouteResults(AnswerStatistics):
    """Content of routes.json."""

    classes: list[str]
    layers: int
    regimes: dict[str, dict]  # by kind of question (blank.py)
    effects: list[RouteEffect]


# ------------------------------------------------------------------------------------------ cuts
def windows(width: int, layers: int, stride: int = 1) -> list[list[int]]:
    """Return the first and the last layer of each window, "all layers" first."""
    last_start = layers - width + 1
    sliding = [[first, first + width - 1] for first in range(1, last_start + 1, stride)]
    return [[1, layers], *sliding]


def layers_cut(places: Sequence[Sequence[int]], layers: int) -> Tensor:
    """Return the layers from the first to the last of each place, bool[1 + W, L]."""
    cut = torch.zeros(len(places), layers, dtype=torch.bool)
    for in_place, (first, last) in zip(cut, places, strict=True):
        in_place[first - 1 : last] = True
    return cut


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
        chosen = rng.choice(outside, count, replace=False)
        drawn[chosen] = True
        if count < len(inside):
            rest = rng.choice(inside, len(inside) - count, replace=False)
            drawn[rest] = True
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
            "blank": self._scores(self.mllm.preprocess([blank_picture(image)]), question.text)[0],
        }
        for site, states in self.mllm.states(pixels, [*self.probes]).items():
            logits = self.probes[site](states.float())[0].cpu()
            results[f"probe:{site}"] = logits[place].mean(0).log_softmax(-1)
        sources = {
            "image": torch.ones_like(place)[None],
            "object": place[None],
            "random": random_patches(place, self.options.draws, [self.options.seed, number]),
        }
        for target in TARGETS:
            scores_by_source = self._cut_routes(pixels, question.text, target, sources)
            for source, scores in scores_by_source.items():
                route = f"{source} to {target}"
                results |= outcomes(route, scores=scores, none=none, right=question.right)
        return results

    def _cut_routes(
        self, pixels: Tensor, text: str, target: str, sources: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the log-probability of each class, f[draws, 1 + W, K], with a target cut off from each source.

        Args:
            pixels: f[1, 3, H, W].
            text: The question.
            target: One of `TARGETS`.
            sources: bool[draws, T] by name.
        """
        layers = layers_cut(self.places, self.layers)
        patches = torch.cat([*sources.values()])
        cuts = len(layers)
        scores = self._scores_under(
            pixels,
            text=text,
            rows=TARGETS[target],
            layers=layers.repeat(len(patches), 1),
            blocked=patches.repeat_interleave(cuts, 0),
        )
        draws = [len(drawn) for drawn in sources.values()]
        by_source = scores.unflatten(0, (-1, cuts)).split(draws)
        return dict(zip(sources, by_source, strict=True))

    def _scores(self, pixels: Tensor, text: str, knockout: Knockout | None = None) -> Tensor:
        """Return the log-probability of each class as the answer, f[R, K], normalised over classes."""
        scores = self.mllm.answer_log_probs(
            pixels, question=text, answers=self.classes, knockout=knockout
        )
        return scores.log_softmax(-1)

    def _scores_under(
        self, pixels: Tensor, text: str, rows: tuple[str, ...], layers: Tensor, blocked: Tensor
    ) -> Tensor:
        """Return the same under R knockouts, f[R, K], in layers bool[R, L] and of patches bool[R, T]."""
        scores = []
        for start in range(0, len(layers), self.options.batch_size):
            batch = slice(start, start + self.options.batch_size)
            knockout = Knockout(blocked[batch], layers[batch], rows)
            repeated = pixels.expand(len(knockout.blocked), -1, -1, -1)
            scores.append(self._scores(repeated, text, knockout))
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


def answer_statistics(tensors: Tensors, sites: Sequence[str], seed: int) -> AnswerStatistics:
    """Return how many answers are right, beside the probes at the same places.

    Args:
        tensors: Content of routes.safetensors.
        sites: Sites of the probes.
        seed: Seed of the bootstrap.
    """

    def entry(values: Tensor, lowest: float = 0.0) -> EstimateEntry:
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
) -> list[RouteEffect]:
    """Return the effects of all routes.

    Args:
        tensors: Content of routes.safetensors.
        places: First and last layer of each cut, all layers first.
        seed: Seed of the bootstrap.
    """
    effects = []
    windows_cut = [{"layers": list(place)} for place in places[1:]]
    for target, source in product(TARGETS, SOURCES):
        effect: RouteEffect = {"source": source, "target": target}
        for outcome, (of_all, by_window) in OUTCOMES.items():
            values = change(tensors, outcome=outcome, source=source, target=target)
            mean, resampled = mean_over_questions(tensors, values, seed)
            effect[of_all] = Estimate(mean[0].item(), resampled[:, 0]).json()
            effect[by_window] = band_entries(windows_cut, mean[1:], resampled[:, 1:])
        correct = change(tensors, outcome="correct", source=source, target=target)[:, 0]
        mean, resampled = mean_over_questions(tensors, correct, seed)
        effect["right"] = Estimate(mean.item(), resampled).json()
        effects.append(effect)
    return effects


def change(tensors: Tensors, outcome: str, source: str, target: str) -> Tensor:
    """Return an outcome when a route is cut, f[Q, 1 + W]: "right" in nats more, "changed", or "correct"."""
    if source == CONTRAST:
        of_object = change(tensors, outcome=outcome, source="object", target=target)
        of_random = change(tensors, outcome=outcome, source="random", target=target)
        return of_object - of_random
    values = tensors[f"{outcome}:{source} to {target}"].double()
    if outcome != "right":
        return values
    none = tensors["none"].gather(1, tensors["right"][:, None]).double()
    return values - none


def band_entries(
    places: Sequence[dict[str, int | list[int]]], values: Tensor, resampled: Tensor
) -> list[BandEntry]:
    """Return each place with its value f[P], and an interval from f[R, P] that holds for all places together."""
    low, high = simultaneous_band(values, resampled)
    ends = torch.stack([low, high], 1)
    entries = []
    for place, value, ci95 in zip(places, values.tolist(), ends.tolist(), strict=True):
        entries.append(place | {"value": value, "ci95": ci95})
    return entries


def claimed_routes(tensors: Tensors, seed: int) -> dict[str, Estimate]:
    """Return the number of the claim: how much less probable the answer is without its object than without others."""
    without_object = tensors["probability:object to text"][:, 0].double()
    without_random = tensors["probability:random to text"][:, 0].double()
    drop = without_random - without_object
    mean, resampled = mean_over_questions(tensors, drop, seed)
    return {"route_object": Estimate(mean.item(), resampled, {"n": _counts(tensors)})}
