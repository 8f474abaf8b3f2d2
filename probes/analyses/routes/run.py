"""`probes routes`: which way an answer takes from the patches of its object to the last token.

Each question asks for the class at a place, its object, with one of the run's class names as the right answer
(answers/questions.py). A route is cut by a knockout with rows and columns of the prompt: no token of the target attends
to a token of the source, in all layers, or in each window of K layers, whose first layers are a stride apart.

    targets   question (with its options), last (token before the answer), text (question, last and answer), image
    sources   image, all image tokens; object, the patches at the place; others, all other patches; random, as many
              random patches outside of the place as the object has, and some of its own where these are too few,
              averaged over draws
              question, for the target last

The outcomes are the log-probability of the right answer, normalised over the class names, and whether the most probable
name changes. No probe takes part.

    routes.json         settings and effects, see effects.py
    routes.safetensors  "image", "right" long[Q]; "none" f[Q, K], log-probabilities without a knockout;
                        "right:ROUTE" f[Q, 1 + W], that of the right answer, in all layers and by window;
                        "probability:ROUTE" f[Q, 1 + W], the right answer's probability;
                        "changed:ROUTE" f[Q, 1 + W], 1 where the answer is another one; each the mean over draws
    routes_effects.safetensors   what claims are made from, see probes/analyses/effects.py
    routes.partial/     finished batches, removed at the end

Shapes: Q questions, K classes, T image tokens, W windows, L layers, R rows of a forward.
"""

import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses.answers.questions import (
    Question,
    QuestionFile,
    first_questions,
    read_question_image,
    read_questions,
    tokens_in_box,
)
from probes.analyses.base import check_has_llm
from probes.analyses.batch_cache import cached_batches
from probes.analyses.effects import effects_path
from probes.analyses.replacement import check_replaceable
from probes.evaluation.effect_file import effect_file
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.knockout import Knockout
from probes.results.probe_run import ProbeRun

from . import RoutesOptions
from .effects import claimed_routes, print_routes, route_effects

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

    def compute(numbers: range) -> dict[str, Tensor]:
        results = [ask(mllm, plan, file, number, classes, places) for number in numbers]
        return {key: torch.stack([result[key] for result in results]) for key in results[0]}

    arguments = made_from | {"images": str(plan.images)}
    partial = out / "routes.partial"
    batches = cached_batches(partial, arguments, asked, QUESTIONS_PER_FILE, compute)
    tensors = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    results = {key: run.metrics[key] for key in ("image_attention", "untrained", "classes")}
    results |= made_from | {"questions_file": plan.questions.name}
    results |= route_effects(tensors, places, plan.seed)
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


def ask(
    mllm: FrozenMLLM,
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
    none = mllm.answer_log_probs(pixels, [question.text], classes)[0, 0].log_softmax(-1)
    results = {
        "image": torch.tensor(question.image),
        "right": torch.tensor(question.right),
        "none": none,
    }
    cut = layers_cut(places, len(mllm.layers))
    sources = blocked_patches(place, plan.draws, [plan.seed, number])
    asked = ("question",)
    if any(mllm.chat.is_option(question.text)):
        asked = ("question", "options")
    targets = {
        "question": asked,
        "last": ("last",),
        "text": (*asked, "last", "answer"),
        "image": ("image",),
    }
    for target, rows in targets.items():
        blocked = torch.cat([*sources.values()]).repeat_interleave(len(cut), 0)
        layers = cut.repeat(len(blocked) // len(cut), 1)
        knockouts = _batches(plan.batch_size, rows, "blocked", layers, blocked)
        scores = _scores(mllm, pixels, question, classes, knockouts).unflatten(0, (-1, len(cut)))
        counts = [len(patches) for patches in sources.values()]
        for source, of_source in zip(sources, scores.split(counts), strict=True):
            results |= _outcomes(f"{source} to {target}", of_source, none, question.right)
    knockouts = _batches(plan.batch_size, ("last",), asked, cut)
    scores = _scores(mllm, pixels, question, classes, knockouts)[None]
    return results | _outcomes("question to last", scores, none, question.right)


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
    everything = torch.ones_like(place)
    return {
        "image": everything[None],
        "object": place[None],
        "others": ~place[None],
        "random": random,
    }


def _batches(
    size: int,
    rows: tuple[str, ...],
    columns: str | tuple[str, ...],
    layers: Tensor,
    blocked: Tensor | None = None,
) -> list[Knockout]:
    """Return knockouts of at most `size` rows each."""
    parts = layers.split(size)
    of_parts = [None] * len(parts) if blocked is None else blocked.split(size)
    return [
        Knockout(patches, part, rows, columns)
        for patches, part in zip(of_parts, parts, strict=True)
    ]


def _scores(
    mllm: FrozenMLLM,
    pixels: Tensor,
    question: Question,
    classes: list[str],
    knockouts: list[Knockout],
) -> Tensor:
    """Return the log-probability of each class as the answer, f[R, K], normalised over classes."""
    scores = [
        mllm.answer_log_probs(
            pixels.expand(len(knockout.layers), -1, -1, -1), [question.text], classes, knockout
        )
        for knockout in knockouts
    ]
    return torch.cat(scores)[:, 0].log_softmax(-1)


def _outcomes(
    route: str,
    scores: Tensor,
    none: Tensor,
    right: int,
) -> dict[str, Tensor]:
    """Return the outcomes of a route, f[1 + W] each, means over draws of scores f[draws, 1 + W, K]."""
    changed = (scores.argmax(-1) != none.argmax()).float()
    return {
        f"right:{route}": scores[..., right].mean(0),
        f"probability:{route}": scores[..., right].exp().mean(0),
        f"changed:{route}": changed.mean(0),
    }


def run(options: RoutesOptions) -> None:
    """Run `probes routes`."""
    probe_run = ProbeRun(options.probes)
    check_has_llm(probe_run, "routes")
    with exclusive_run_lock(options.folder, "routes.json"):
        results = measure_routes(probe_run, options)
    print_routes(results)
