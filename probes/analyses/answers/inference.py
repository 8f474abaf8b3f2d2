"""Statistics of answers: accuracy beside the probes', and effects of knockouts on the right answer.

Images are resampled with all their questions; answers and probes, and runs on the same questions, alike. Effects are
tested by class of the right answer as those of the knockout are (knockout/effects.py): two-sided p from swapping the
two conditions on whole images, Holm's correction over classes, t intervals for classes in general.

The paper makes no claim about answers. All of this is exploratory.

Shapes: Q questions, K classes, R resamplings, N images.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import holm, p_values, random_swaps
from llava_bidir.common.errors import UserError
from probes.analyses.knockout.contrasts import MIN_IMAGES, mean_over_classes
from probes.analyses.knockout.rates import Cases, image_weights
from probes.evaluation.estimate import Estimate
from probes.results.probe_run import ProbeRun
from probes.results.run_files import read_tensors

CONDITIONS = ("none", "incorrect", "correct", "matched_incorrect", "matched_correct")
EFFECTS = [(name, control) for name in CONDITIONS[1:3] for control in ("none", f"matched_{name}")]

Tensors = dict[str, Tensor]  # content of answers.safetensors


def answer_statistics(
    tensors: Tensors,
    sites: Sequence[str],
    classes: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Return the statistics of a run's answers; values with intervals are {"value", "ci95"}.

    Returns:
        {"questions", "images": numbers, "accuracy", "sites": [{"site", "accuracy", "difference": answer minus probe,
        "agreement": share of questions on which both say the same}], "effects": [{"condition", "control", "mean": of
        :func:`mean_over_classes`, "classes": [{"class", "images", "cases", "value", "ci95", "p", "p_holm"}]}]}.
        Effects are changes of the right answer's log-probability in nats. Classes in fewer than `MIN_IMAGES` images are
        left out.
    """
    cases = _cases(tensors)
    weights = image_weights(tensors["image"], seed)
    answered = _right(tensors, "answer")
    swaps = random_swaps(weights.shape[1], seed=seed)

    def entry(values, lowest=0.0):
        return _mean(values, cases, weights).json(lowest=lowest, highest=1.0)

    by_site = []
    for site in sites:
        read = _right(tensors, f"probe:{site}")
        same = _chosen(tensors, "answer") == _chosen(tensors, f"probe:{site}")
        numbers = {
            "accuracy": entry(read),
            "difference": entry(answered - read, -1.0),
            "agreement": entry(same.double()),
        }
        by_site.append({"site": site} | numbers)
    effects = []
    for condition, control in EFFECTS:
        change = _change(tensors, condition, control)
        rows = []
        by_class = {}
        for name, chosen in _questions_by_class(tensors, classes).items():
            of_class = _cases(tensors, chosen)
            by_class[name] = _mean(change[chosen], of_class, weights)
            signs = 1 - 2 * swaps.double()[:, of_class.images]
            swapped = signs @ change[chosen].double()[:, None] / len(change[chosen])
            p, _ = p_values(swapped)
            rows.append(
                {
                    "class": name,
                    **of_class.counts,
                    **by_class[name].json(),
                    "p": p.item(),
                }
            )
        for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = adjusted
        effect = {
            "condition": condition,
            "control": control,
            "mean": mean_over_classes(by_class),
        }
        effects.append(effect | {"classes": rows})
    counts = {"questions": len(answered), "images": cases.counts["images"]}
    return counts | {
        "accuracy": entry(answered),
        "sites": by_site,
        "effects": effects,
    }


def beyond_random(run: ProbeRun, draws: Sequence[ProbeRun]) -> dict[str, Any] | None:
    """Return what a run's answers have beyond those of random LLMs on the same questions.

    Returns:
        {"draws", "accuracy": {"value", "ci95"}, "effects": [{"condition", "control", "mean"}]},
        each the run's number minus the mean of the draws'. Intervals are over images, and for effects over classes, but
        not over draws. None without draws.

    Raises:
        UserError: The runs were asked different questions.
    """
    if not draws:
        return None
    results = run.analysis("answers.json")
    first = _read(run)
    weights = image_weights(first["image"], results["seed"])
    classes = results["classes"]
    others = [_read(draw) for draw in draws]
    for draw, other in zip(draws, others, strict=True):
        same = draw.analysis("answers.json")["questions_sha256"] == results["questions_sha256"]
        if not same or not torch.equal(other["image"], first["image"]):
            raise UserError(
                f"{run.path} and {draw.path} were asked different questions; run `probes answers` alike"
            )
    answered = _right(first, "answer") - torch.stack(
        [_right(other, "answer") for other in others]
    ).mean(0)
    effects = []
    for condition, control in EFFECTS:
        random = torch.stack([_change(other, condition, control) for other in others]).mean(0)
        more = _change(first, condition, control) - random
        by_class = {
            name: _mean(more[chosen], _cases(first, chosen), weights)
            for name, chosen in _questions_by_class(first, classes).items()
        }
        effects.append(
            {
                "condition": condition,
                "control": control,
                "mean": mean_over_classes(by_class),
            }
        )
    accuracy = _mean(answered, _cases(first), weights).json()
    return {
        "draws": len(draws),
        "accuracy": accuracy,
        "effects": effects,
    }


def _change(tensors: Tensors, condition: str, control: str) -> Tensor:
    """Return the change of the right answer's log-probability, f[Q]."""
    return tensors[f"right:{condition}"] - tensors[f"right:{control}"]


def _read(run: ProbeRun) -> Tensors:
    return read_tensors(run.path / "answers.safetensors")


def _cases(tensors: Tensors, chosen: Tensor | slice = slice(None)) -> Cases:
    return Cases({}, tensors["image"][chosen])


def _mean(values: Tensor, cases: Cases, weights: Tensor) -> Estimate:
    mean, resampled = cases.mean(values, weights)
    return Estimate(mean.item(), resampled)


def _chosen(tensors: Tensors, reader: str) -> Tensor:
    """Return the most probable class by a reader, "answer" or "probe:SITE", long[Q]."""
    return tensors[reader].argmax(-1)


def _right(tensors: Tensors, reader: str) -> Tensor:
    """Return 1 where a reader is right, else 0, f[Q]."""
    return (_chosen(tensors, reader) == tensors["right"]).double()


def _questions_by_class(tensors: Tensors, classes: Sequence[str]) -> dict[str, Tensor]:
    """Return the questions with each right answer, bool[Q], of the classes in enough images."""
    by_class = {name: tensors["right"] == k for k, name in enumerate(classes)}
    return {
        name: chosen
        for name, chosen in by_class.items()
        if _cases(tensors, chosen).counts["images"] >= MIN_IMAGES
    }
