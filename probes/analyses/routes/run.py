"""`probes routes`: does the model say what its probes read, and which way does an answer take to the last token?

Each question asks for the class at a place, its object, with one of the run's class names as the right answer
(questions.py). The probes of all sites read the tokens at that place (several: the mean of their logits).

A route is cut by a knockout with rows and columns of the prompt: no token of the target attends to a token of the
source, in all layers, or in each window of K layers, whose first layers are a stride apart.

    targets   question, last (token before the answer), text (question, last and answer)
    sources   image, all image tokens; object, the patches at the place; random, as many random patches outside of the
              place as the object has, and some of its own where these are too few, averaged over draws

The outcomes are the log-probability of the right answer, normalised over the class names, and whether the most probable
name changes and is right. No probe takes part in them.

    routes.json         settings, accuracies and effects, see effects.py; "sinks", see measured_sinks.py
    routes.safetensors  "image", "right" long[Q]; "none", "probe:SITE" f[Q, K], log-probabilities without a knockout;
                        "right:ROUTE" f[Q, 1 + W], that of the right answer, in all layers and by window;
                        "probability:ROUTE" f[Q, 1 + W], the right answer's probability;
                        "changed:ROUTE", "correct:ROUTE" f[Q, 1 + W], 1 where the answer is another one, and where it
                        is right; each the mean over draws
    routes_effects.safetensors   what claims are made from, see probes/analyses/effects.py
    routes.partial/     finished batches, removed at the end

Shapes: Q questions, K classes, T image tokens, W windows, L layers, R rows of a forward.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import exclusive_run_lock, write_files
from probes.analyses.base import check_has_llm
from probes.analyses.batch_cache import cached_batches
from probes.analyses.effects import effects_path
from probes.analyses.measured_sinks import IMAGES, measure_sinks
from probes.analyses.replacement import check_replaceable
from probes.heads import Probe
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.knockout import Knockout
from probes.runs.probe_run import ProbeRun
from probes.score.effect_file import effect_file

from . import RoutesOptions
from .effects import TARGETS, answer_statistics, claimed_routes, print_routes, route_effects
from .questions import (
    QuestionFile,
    first_questions,
    read_question_image,
    read_questions,
    tokens_in_box,
)

QUESTIONS_PER_FILE = 8


def windows(width: int, layers: int, stride: int = 1) -> list[list[int]]:
    """Return the first and the last layer of each window, "all layers" first."""
    last_start = layers - width + 1
    sliding = [[first, first + width - 1] for first in range(1, last_start + 1, stride)]
    return [[1, layers], *sliding]


def layers_cut(places: Sequence[Sequence[int]], layers: int) -> Tensor:
    """Return the layers from the first to the last of each place, bool[1 + W, L]."""
    numbers = torch.arange(1, layers + 1)
    return torch.stack([(numbers >= first) & (numbers <= last) for first, last in places])


def measure_routes(run: ProbeRun, plan: RoutesOptions) -> dict[str, Any]:
    """Cut each route for each question, write the files named above, and return the content of routes.json.

    The same call resumes after the last finished batch if a previous one was killed.

    Raises:
        UserError: The questions do not fit the run, its model cannot be asked, or there is a result of other questions,
            options or runs, which may not be replaced.
    """
    out = plan.folder
    classes = run.metrics["classes"]
    mllm = run.mllm()
    layers = len(mllm.layers)
    if not 1 <= plan.window <= layers:
        raise UserError(f"window is {plan.window}; expected 1 to {layers}, the model's layers")
    plan = plan.located(run.manifest["data"]["root"])
    file = read_questions(plan.questions, classes)
    asked = range(len(first_questions(plan.questions, file, plan.limit)))
    made_from = {"runs": [run.fingerprint], "questions_sha256": file.sha256} | plan.settings
    check_replaceable(out / "routes.json", made_from, plan.overwrite)
    places = windows(plan.window, layers, plan.stride)

    probes = {site: probe.to(mllm.device) for site, probe in run.probes().items()}

    def compute(numbers: range) -> dict[str, Tensor]:
        results = [ask(mllm, probes, plan, file, number, classes, places) for number in numbers]
        return {key: torch.stack([result[key] for result in results]) for key in results[0]}

    arguments = made_from | {"images": str(plan.images)}
    partial = out / "routes.partial"
    tensors = cached_batches(partial, arguments, asked, QUESTIONS_PER_FILE, compute)
    results = {key: run.metrics[key] for key in ("image_attention", "untrained", "classes")}
    results |= made_from | {"questions_file": plan.questions.name}
    results |= answer_statistics(tensors, run.sites, plan.seed)
    results["effects"] = route_effects(tensors, places, plan.seed)
    names = file.images[:IMAGES]
    results["sinks"] = measure_sinks(
        mllm, [read_question_image(plan.images, name) for name in names]
    )
    effects = effect_file(claimed_routes(tensors, plan.seed), run.fingerprint)
    write_files(
        {
            out / "routes.safetensors": tensors,
            effects_path(out, "routes"): effects,
            out / "routes.json": results,
        }
    )
    shutil.rmtree(partial)
    return results


@dataclass(frozen=True)
class Asked:
    """A question that is asked about its image, under knockouts.

    Args:
        mllm: The model.
        pixels: Its image, f[1, 3, H, W].
        text: The question.
        classes: The possible answers.
        batch_size: Knockouts per forward.
    """

    mllm: FrozenMLLM
    pixels: Tensor
    text: str
    classes: list[str]
    batch_size: int

    def plain(self) -> Tensor:
        """Return the log-probability of each class as the answer, f[K], normalised over classes."""
        scores = self.mllm.answer_log_probs(self.pixels, self.text, self.classes)
        return scores[0].log_softmax(-1)

    def cut(
        self,
        rows: tuple[str, ...],
        layers: Tensor,
        blocked: Tensor,
    ) -> Tensor:
        """Return the same under R knockouts, f[R, K], in layers bool[R, L] and of patches bool[R, T]."""
        scores = []
        for start in range(0, len(layers), self.batch_size):
            part = slice(start, start + self.batch_size)
            knockout = Knockout(blocked[part], layers[part], rows)
            pixels = self.pixels.expand(len(layers[part]), -1, -1, -1)
            found = self.mllm.answer_log_probs(pixels, self.text, self.classes, knockout)
            scores.append(found)
        return torch.cat(scores).log_softmax(-1)


def ask(
    mllm: FrozenMLLM,
    probes: dict[str, Probe],
    plan: RoutesOptions,
    file: QuestionFile,
    number: int,
    classes: list[str],
    places: list[list[int]],
) -> dict[str, Tensor]:
    """Return the results of a question, by key of routes.safetensors."""
    question = file.questions[number]
    image = read_question_image(plan.images, file.images[question.image])
    pixels = mllm.preprocess([image])
    place = tokens_in_box(mllm.geometry, (image.height, image.width), question.box)
    if place.all():
        raise UserError(
            f"{plan.questions}: the place of {question.text!r} is all of {file.images[question.image]}; expected a part"
        )
    asked = Asked(mllm, pixels, question.text, classes, plan.batch_size)
    none = asked.plain()
    results = {
        "image": torch.tensor(question.image),
        "right": torch.tensor(question.right),
        "none": none,
    }
    for site, states in mllm.states(pixels, list(probes)).items():
        logits = probes[site](states.float())[0].cpu()
        results[f"probe:{site}"] = logits[place].mean(0).log_softmax(-1)
    cut = layers_cut(places, len(mllm.layers))
    sources = blocked_patches(place, plan.draws, [plan.seed, number])
    counts = [len(patches) for patches in sources.values()]
    patches = torch.cat([*sources.values()])
    blocked = patches.repeat_interleave(len(cut), 0)
    layers = cut.repeat(len(patches), 1)
    for target, rows in TARGETS.items():
        scores = asked.cut(rows, layers, blocked)
        by_source = scores.unflatten(0, (-1, len(cut))).split(counts)
        for source, of_source in zip(sources, by_source, strict=True):
            results |= _outcomes(f"{source} to {target}", of_source, none, question.right)
    return results


def blocked_patches(place: Tensor, draws: int, seed: list[int]) -> dict[str, Tensor]:
    """Return the patches of each source, bool[draws or 1, T], of an object's patches bool[T]."""
    outside = (~place).nonzero().flatten().numpy()
    inside = place.nonzero().flatten().numpy()
    count = min(len(inside), len(outside))
    rng = np.random.default_rng(seed)
    random = torch.zeros(draws, len(place), dtype=torch.bool)
    for drawn in random:
        drawn[torch.from_numpy(rng.choice(outside, count, replace=False))] = True
        if count < len(inside):
            # too few others: some of the object's own, which makes the difference smaller
            rest = rng.choice(inside, len(inside) - count, replace=False)
            drawn[torch.from_numpy(rest)] = True
    return {
        "image": torch.ones_like(place)[None],
        "object": place[None],
        "random": random,
    }


def _outcomes(
    route: str,
    scores: Tensor,
    none: Tensor,
    right: int,
) -> dict[str, Tensor]:
    """Return the outcomes of a route, f[1 + W] each, means over draws of scores f[draws, 1 + W, K]."""
    answers = scores.argmax(-1)
    changed = (answers != none.argmax()).float()
    correct = (answers == right).float()
    return {
        f"right:{route}": scores[..., right].mean(0),
        f"probability:{route}": scores[..., right].exp().mean(0),
        f"changed:{route}": changed.mean(0),
        f"correct:{route}": correct.mean(0),
    }


def run(options: RoutesOptions) -> None:
    """Run `probes routes`."""
    probe_run = ProbeRun(options.probes, trust=options.trust)
    check_has_llm(probe_run, "routes")
    with exclusive_run_lock(options.folder, "routes.json"):
        results = measure_routes(probe_run, options)
    print_routes(results)
