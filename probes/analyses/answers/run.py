"""`probes answers`: does the model say what its probes read at the same place, and what do knockouts change?

Each question asks for the class at a place. The model answers with one of the run's class names, by their
log-probabilities after the question, normalised over the classes. The probes of all sites read the tokens at that place
(several: the mean of their logits). Then Eq. 1 blocks, while the model reads the image:

    none                nothing
    incorrect, correct  the tokens that the adapter's probe predicts as the wrong or the right class; the wrong class is
                        the most probable other one at the place, by that probe
    matched_X           as many tokens as X, matched in distance to the place and in the attention that it pays

and the log-probability of the right answer is measured. Text attends to all image tokens, blocked ones included.

    answers.json        settings, accuracies by site, effects by class, see inference.py
    answers.safetensors "image", "right", "wrong" long[Q]; "answer" and "probe:SITE" f[Q, K], log-probabilities;
                        "right:CONDITION" f[Q], that of the right answer; "tokens:X" long[Q], tokens hidden
    answers.partial/    finished batches, removed at the end

Shapes: B questions of a batch, Q questions, K classes, T image tokens, R conditions and draws.
"""

import shutil
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses.base import check_has_llm
from probes.analyses.batch_cache import cached_batches
from probes.analyses.knockout import KnockoutOptions
from probes.analyses.knockout.attention import attention_from
from probes.analyses.knockout.cases import ConfusionCase, PatchReader
from probes.analyses.knockout.conditions import MatchingFeatures, blocked_by_condition
from probes.analyses.knockout.config import check_has_layers
from probes.analyses.knockout.schema import SETS
from probes.analyses.replacement import check_replaceable
from probes.evaluation.estimate import estimate_text
from probes.models.knockout import Knockout
from probes.models.sites import ADAPTER
from probes.results.probe_run import ProbeRun

from . import AnswersOptions
from .inference import CONDITIONS, answer_statistics
from .questions import (
    Question,
    QuestionFile,
    first_questions,
    read_question_image,
    read_questions,
    tokens_in_box,
)


def ask_questions(run: ProbeRun, plan: AnswersOptions) -> dict[str, Any]:
    """Ask all questions, write the files named above, and return the content of answers.json.

    The same call resumes after the last finished batch if a previous one was killed.

    Raises:
        UserError: The questions do not fit the run, its model cannot be asked, or there is a result of other questions,
            options or runs, and not `overwrite`.
        RuntimeError: A knockout changed no answer, so that it did not reach the model.
    """
    plan = plan.located(run.manifest["data"]["root"])
    out = plan.folder
    classes = run.metrics["classes"]
    file = read_questions(plan.questions, classes)
    asked = first_questions(plan.questions, file, plan.limit)
    check_has_layers(run, [])
    settings = plan.settings
    made_from = {"runs": [run.fingerprint], "questions_sha256": file.sha256} | settings
    check_replaceable(out / "answers.json", made_from, plan.overwrite)
    reader = PatchReader(run)

    def compute(questions):
        return ask_batch(reader, plan, file, questions, classes)

    arguments = {
        "plan": settings,
        "questions": file.sha256,
        "images": str(plan.images),
        "run": run.fingerprint,
    }
    batches = cached_batches(
        out / "answers.partial",
        arguments,
        asked,
        plan.batch_size,
        compute,
    )
    tensors = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    check_effects(tensors)
    results = {key: run.metrics[key] for key in ("image_attention", "untrained", "classes")}
    results |= made_from | {"questions_file": plan.questions.name}
    results |= answer_statistics(tensors, run.sites, classes, plan.seed)
    write_files({out / "answers.safetensors": tensors, out / "answers.json": results})
    shutil.rmtree(out / "answers.partial")
    return results


def check_effects(tensors: dict[str, Tensor]) -> None:
    """Raise a RuntimeError if hiding tokens changed no answer: even a token's own key is hidden from it."""
    for condition in CONDITIONS[1:]:
        hidden = tensors[f"tokens:{condition.removeprefix('matched_')}"] > 0
        change = tensors[f"right:{condition}"][hidden] - tensors["right:none"][hidden]
        # rounding of float32 log-probabilities
        if len(change) and torch.allclose(change, torch.zeros(()), atol=1e-6):
            raise RuntimeError(
                f"hiding {condition} tokens changed none of {len(change)} answers: it had no effect"
            )


def ask_batch(
    reader: PatchReader,
    plan: AnswersOptions,
    file: QuestionFile,
    questions: list[Question],
    classes: list[str],
) -> dict[str, Tensor]:
    """Return the results of a batch of questions, by key of answers.safetensors."""
    mllm = reader.mllm
    images = [
        read_question_image(plan.images, file.images[question.image]) for question in questions
    ]
    sizes = [(image.height, image.width) for image in images]
    pixels = mllm.preprocess(images)
    states = mllm.states(pixels, list(reader.probes))
    places = [
        tokens_in_box(mllm.geometry, size, q.box) for size, q in zip(sizes, questions, strict=True)
    ]
    logits = {}
    for site, probe in reader.probes.items():
        logits[site] = probe(states[site].float()).cpu()
    at_place = {
        site: torch.stack([values[i, place].mean(0) for i, place in enumerate(places)])
        for site, values in logits.items()
    }
    results = {f"probe:{site}": values.log_softmax(-1) for site, values in at_place.items()}
    results |= {
        key: torch.tensor([getattr(q, key) for q in questions]) for key in ("image", "right")
    }
    others = at_place[ADAPTER].scatter(1, results["right"][:, None], -torch.inf)
    results["wrong"] = others.argmax(1)
    predicted = logits[ADAPTER].argmax(-1)
    attention = attention_from(mllm, pixels, list(enumerate(places)))
    rows: dict[str, list[Tensor]] = {}
    for i, (question, place) in enumerate(zip(questions, places, strict=True)):
        case = _case(
            question,
            i,
            int(results["wrong"][i]),
            predicted[i],
            place,
        )
        features = MatchingFeatures.from_case(
            case,
            mllm.grid,
            states[ADAPTER][i],
            attention[i],
        )
        scored = _score(
            mllm,
            pixels[i : i + 1],
            question.text,
            classes,
            _blocked(case, features, plan),
        )
        row = {"answer": scored["none"]} | {
            f"right:{key}": scored[key][question.right] for key in CONDITIONS
        }
        row |= {f"tokens:{name}": case.blocked[name].sum() for name in SETS}
        for key, value in row.items():
            rows.setdefault(key, []).append(value)
    return results | {key: torch.stack(values) for key, values in rows.items()}


def _case(
    question: Question,
    row: int,
    wrong: int,
    predicted: Tensor,
    place: Tensor,
) -> ConfusionCase:
    """Return the question as a case of the knockout, whose "mistaken" patches are those at the place."""
    blocked = {"incorrect": predicted == wrong, "correct": predicted == question.right}
    counts = int(place.sum()), int(blocked["correct"].sum())
    return ConfusionCase(
        question.image, row, *counts, wrong, question.right, place, predicted, blocked
    )


def _blocked(
    case: ConfusionCase, features: MatchingFeatures, plan: AnswersOptions
) -> dict[str, list[Tensor]]:
    """Return the blocked tokens of each condition, one or several draws bool[T]."""
    knockout = KnockoutOptions(
        probes=plan.probes,
        classes=(),
        controls=("matched",),
        draws=plan.draws,
        seed=plan.seed,
    )
    tokens = blocked_by_condition(case, features, knockout) | {
        "none": [torch.zeros_like(case.mistaken)]
    }
    return {condition: tokens[condition] for condition in CONDITIONS}


def _score(
    mllm,
    pixels: Tensor,
    question: str,
    classes: list[str],
    blocked: dict[str, list[Tensor]],
) -> dict[str, Tensor]:
    """Return the log-probability of each class as the answer, f[K] by condition, mean over draws; one forward."""
    draws = [tokens for values in blocked.values() for tokens in values]
    images = pixels.expand(len(draws), -1, -1, -1)
    scores = mllm.answer_log_probs(images, [question], classes, Knockout(torch.stack(draws)))[
        :, 0
    ].log_softmax(-1)
    parts = scores.split([len(values) for values in blocked.values()])
    return {condition: part.mean(0) for condition, part in zip(blocked, parts, strict=True)}


def run(options: AnswersOptions) -> None:
    """Run `probes answers`."""
    probe_run = ProbeRun(options.probes)
    check_has_llm(probe_run, "answers")
    with exclusive_run_lock(options.folder, "answers.json"):
        results = ask_questions(probe_run, options)
    print_answers(results)


def print_answers(results: dict[str, Any]) -> None:
    """Print the accuracies of answers and probes, and the mean effects over classes."""
    asked = f"{results['questions']} questions about {results['images']} images"
    by_chance = f"{1 / len(results['classes']):.1%} by a random class"
    accuracy = estimate_text(results["accuracy"], ".1%")
    print(f"{asked}, answered correctly: {accuracy} ({by_chance})")
    for entry in results["sites"]:
        accuracy = estimate_text(entry["accuracy"], ".1%")
        agreement = entry["agreement"]["value"]
        print(f"  probe at {entry['site']:<11} {accuracy}, agrees in {agreement:.1%}")
    print("Change in the log-probability of the right answer, mean over classes (nats):")
    for effect in results["effects"]:
        mean = effect["mean"]
        held = sum(row["p_holm"] < 0.05 for row in effect["classes"])
        comparison = f"{effect['condition']} against {effect['control']}"
        if mean["value"] is None:
            value = "no class"
        elif mean["ci95"] is None:
            value = f"{mean['value']:+.3f} no interval"
        else:
            value = estimate_text(mean, "+.3f")
        print(
            f"  {comparison:<36} {value}; significant in {held} of {len(effect['classes'])} classes"
        )
