"""Tables of the knockout's inference, by mask."""

from typing import Any

from probes.results.formatting import Rows, bounds


def knockout_tables(inference: dict[str, dict[str, Any]]) -> dict[str, Rows]:
    """Return the tables of `knockout_inference` by mask: classes, means and criterion shifts."""
    return {
        "knockout_classes": _knockout_class_rows(inference),
        "knockout_means": knockout_mean_rows(inference),
        "knockout_shifts": shift_rows(inference),
    }


def _knockout_class_rows(inference: dict[str, dict[str, Any]]) -> Rows:
    """Return the tests of the classes by outcome, with the interval in two columns."""
    return [
        {"image_attention": mask, "outcome": outcome}
        | {name: value for name, value in row.items() if name != "ci95"}
        | bounds(row["ci95"])
        for mask, of_mask in inference.items()
        for outcome, of_outcome in of_mask["outcomes"].items()
        for row in of_outcome["classes"]
    ]


def knockout_mean_rows(inference: dict[str, dict[str, Any]]) -> Rows:
    """Return each effect as a mean over classes and over pairs of look-alikes."""
    return [
        {"image_attention": mask, "outcome": outcome, "effect": effect, "mean_over": over, "value": mean["value"]}
        | bounds(mean["ci95"] or [None, None])
        | {key: mean[key] for key in ("classes", "units", "sd", "verdict")}
        for mask, of_mask in inference.items()
        for outcome, of_outcome in of_mask["outcomes"].items()
        for over, means in (("classes", of_outcome["mean"]), ("pairs", of_outcome["mean_over_pairs"]))
        for effect, mean in means.items()
    ]


def shift_rows(inference: dict[str, dict[str, Any]]) -> Rows:
    """Return the move of the read-out towards the first class of a pair, by class hidden."""
    return [
        {"image_attention": mask, "first": entry["classes"][0], "second": entry["classes"][1], "hidden": name}
        | {"move_to_first": move["value"], **bounds(move["ci95"])}
        | {"images": entry["images"], "shift": entry["shift"], "towards": entry["towards"]}
        for mask, of_mask in inference.items()
        for entry in of_mask["criterion_shifts"] or ()
        for name, move in entry["hide"].items()
    ]
