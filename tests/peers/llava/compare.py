"""Differences between two recorded trainings."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass
class Training:
    """A recorded training, read back.

    Args:
        record: Losses of micro-batches, steps, parameter groups and facts.
        batches: Tensors that the model was fed, by `MICRO_BATCH/NAME`.
        weights: Parameters after the last step, by our names.
    """

    record: dict
    batches: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> "Training":
        """Read a folder that :class:`record.Recorder` wrote."""
        return cls(
            json.loads((folder / "record.json").read_text()),
            dict(np.load(folder / "batches.npz")),
            dict(np.load(folder / "weights.npz")),
        )

    def losses(self) -> np.ndarray:
        """Return the loss of each step, the mean of its micro-batches."""
        steps = len(self.record["steps"])
        return np.array(self.record["losses"]).reshape(steps, -1).mean(1)

    def steps(self, key: str) -> np.ndarray:
        """Return a number of each step: "grad_norm", or a part's learning rate."""
        steps = self.record["steps"]
        return np.array([step[key] if key in step else step["lr"][key] for step in steps])


def different_batches(a: Training, b: Training) -> dict[str, int]:
    """Return the number of micro-batches in which a tensor differs; of pixels, by more than rounding."""
    keys = sorted({name.partition("/")[2] for name in a.batches})
    counts = dict.fromkeys(keys, 0)
    for name, other in b.batches.items():
        tensor = a.batches[name]
        key = name.partition("/")[2]
        tolerance = 1e-5 if key == "pixels" else 0  # a step of a pixel's 256 values is 0.0145
        same = tensor.shape == other.shape and np.allclose(tensor, other, rtol=0, atol=tolerance)
        counts[key] += not same
    return counts


LAST = 10  # steps over which the loss at the end is averaged


def weight_differences(a: Training, b: Training, before: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest difference of the trained weights to the largest update, by part."""
    largest: dict[str, list[float]] = {}
    for name in a.record["trainable"]:
        part = "adapter" if "projector" in name else "llm"
        difference, update = largest.setdefault(part, [0.0, 0.0])
        theirs = a.weights[name]
        rows = slice(len(theirs))  # ours may have more rows in its vocabulary
        largest[part] = [
            max(difference, np.abs(theirs - b.weights[name][rows]).max()),
            max(update, np.abs(theirs - before[name][rows]).max()),
        ]
    return {part: float(difference / update) for part, (difference, update) in largest.items()}


def compare(
    a: Training, b: Training, before: dict[str, np.ndarray], rounded: Training | None = None
) -> dict:
    """Return the differences of b from a, over the steps of b.

    Args:
        a, b: Trainings of the same records; b may have stopped early, and then its weights are not compared.
        before: The weights that both start from, by our names.
        rounded: a in the precision of b: the differences that rounding makes in a itself.
    """
    steps = len(b.record["steps"])
    complete = steps == len(a.record["steps"])
    losses = b.losses() - a.losses()[:steps]
    beyond = np.abs(losses)
    by_rounding = np.zeros(steps)
    if rounded is not None:
        by_rounding = np.abs(rounded.losses() - a.losses())
        beyond = np.where(beyond > by_rounding, beyond, 0)
    norms = np.abs(b.steps("grad_norm") / a.steps("grad_norm")[:steps] - 1)
    rates = [
        np.abs(a.steps(part)[:steps] - b.steps(part)).max() for part in a.record["steps"][0]["lr"]
    ]
    frozen = a.weights.keys() - set(a.record["trainable"])
    moved = [x != y for x, y in zip(a.record["order"], b.record["order"], strict=True)]
    return {
        "steps": steps,
        "samples_in_another_place": sum(moved),
        "different_batches": different_batches(a, b),
        "loss": float(np.abs(losses).max()),
        "loss_beyond_rounding": float(beyond.max()),
        "rounding_there": float(by_rounding[np.abs(losses).argmax()]),
        "loss_of_the_last": float(losses[-LAST:].mean()),
        "grad_norm": float(norms.max()),
        "lr": float(max(rates)),
        "weights": weight_differences(a, b, before) if complete else {},
        "frozen_weights_changed": sum(not np.array_equal(b.weights[n], before[n]) for n in frozen),
        "groups_differ": hyperparameters(a) != hyperparameters(b),
    }


def hyperparameters(training: Training) -> dict[str, tuple]:
    """Return what AdamW does with each trained parameter."""
    return {
        name: (group["weight_decay"], group["eps"], *group["betas"])
        for group in training.record["groups"]
        for name in group["parameters"]
    }


def initial_weights(adapter: Path) -> dict[str, np.ndarray]:
    """Return the weights that both programs start from, by our names.

    Args:
        adapter: Folder with an exported model that holds encoder, adapter and LLM.
    """
    from llava_bidir import LlavaBidirForConditionalGeneration

    model = LlavaBidirForConditionalGeneration.from_pretrained(adapter / "hf")
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}
