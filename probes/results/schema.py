"""What the JSON of a run must look like, for runs that come from somewhere else."""

from typing import Any

from llava_bidir.common.errors import UserError

Number, Text = (int, float), str
MAYBE = type(None)

# A type or several; [shape] is a list of such, {key: shape} an object that has these keys, and maybe others.
SITE = {"site": Text, "dim": int, "miou": Number, "miou_ci95": [Number], "pacc": Number, "pacc_ci95": [Number]}
SITE |= {"best_epoch": (*Number, MAYBE), "iou_per_class": [(*Number, MAYBE)], "history": [Number]}
METRICS = {
    **{"dataset": Text, "images": int, "mllm": Text, "image_attention": Text, "untrained": [Text], "seed": int},
    **{"classes": [Text], "grid": [int], "sites": [SITE], "baseline": {"class": Text, "miou": Number, "pacc": Number}},
    "summary": dict.fromkeys(("encoder", "adapter", "peak_llm", "delta_enc", "recovery"), (*Number, MAYBE)),
    "probe": {"head": Text, "feature_norm": Text},
}
MANIFEST = {"data": {"root": Text, "dataset": Text, "fingerprint": Text}, "config": dict, "versions": dict}
MANIFEST |= {"mllm_training": (dict, MAYBE)}
TRAINING = {"encoder": {"name": Text}, "llm": Text, "val/answer_accuracy": Number}  # of these what is there
CONFIG = {"mllm": Text, "image_attention": (Text, MAYBE), "dtype": Text, "image_resize": Text, "seed": int}
CONFIG |= {"untrained": (list, MAYBE)}


def check(value: Any, shape: Any, where: str = "") -> None:
    """
    Raises:
        UserError: Names the first place that is not of this shape.
    """
    kind = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{where or 'it'} is {str(value)[:50]!r}; expected {kinds}")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            if key not in value:
                raise UserError(f"{where or 'it'} has no {key!r}; it is damaged, or of another version: make it again")
            check(value[key], inner, f"{where}.{key}".lstrip("."))
    elif isinstance(shape, list):
        for i, element in enumerate(value):
            check(element, shape[0], f"{where}[{i}]")


def check_manifest(manifest: dict) -> None:
    """manifest.json, and what the model's training.json said, which is in it.

    Raises:
        UserError: Names what is not of the right shape.
    """
    check(manifest, MANIFEST)
    training = manifest["mllm_training"] or {}
    check(training, {key: TRAINING[key] for key in training.keys() & TRAINING.keys()}, "mllm_training")


def check_metrics(metrics: dict) -> None:
    """metrics.json: of the right shape, and its parts agree.

    Raises:
        UserError: Names what does not.
    """
    check(metrics, METRICS)
    check(metrics.get("recipes", {}), dict, "recipes")
    for name, recipe in metrics.get("recipes", {}).items():
        check(recipe, {"probe": dict, "sites": [SITE]}, f"recipes.{name}")
    classes, sites = metrics["classes"], [entry["site"] for entry in metrics["sites"]]
    faults = {
        "classes has one twice, or none": len(set(classes)) != len(classes) or not classes,
        "sites has one twice, or none": len(set(sites)) != len(sites) or not sites,
        "grid is not two numbers from 1 to 128": len(metrics["grid"]) != 2
        or not all(1 <= n <= 128 for n in metrics["grid"]),
        "images is below 1": metrics["images"] < 1,
    }
    for entry in metrics["sites"]:
        faults[f"iou_per_class of {entry['site']!r} is not one for each class"] = len(entry["iou_per_class"]) != len(
            classes
        )
        faults[f"an interval of {entry['site']!r} is not two numbers"] = (
            len(entry["miou_ci95"]) != 2 or len(entry["pacc_ci95"]) != 2
        )
        faults[f"dim of {entry['site']!r} is not from 1 to 1,000,000"] = not 1 <= entry["dim"] <= 1_000_000
    for fault, there in faults.items():
        if there:
            raise UserError(fault)
