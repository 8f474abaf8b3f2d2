"""Sentences and tables about models that are compared on the same photos, for the page and the terminal.

The numbers are those of `model_comparison.py`, in percent and points of mIoU.
"""

from collections.abc import Sequence
from typing import NamedTuple

from probes.runs.formatting import (
    Entry,
    format_interval,
    format_p,
    format_percent,
    format_points,
)

from .model_comparison import BEST_LAYER, class_differs, differs

NAMED_CLASSES = 5  # in a sentence
Cells = dict[str, str]  # of a row, by the titles of the columns


class Comparison(NamedTuple):
    """The models that are compared with one first model, on one dataset and under one mask.

    Args:
        about: Dataset, and the mask of models with an LLM.
        first: The model that all others are compared with.
        pairs: An entry of :func:`compare_models` for each other model.
    """

    about: str
    first: str
    pairs: list[Entry]

    @property
    def title(self) -> str:
        """Names of all models, and what they are compared on."""
        names = [self.first, *(pair["second"] for pair in self.pairs)]
        return f"{', '.join(names[:-1])} and {names[-1]}, {self.about}"

    @property
    def has_tables(self) -> bool:
        """Whether any two of the models can be compared."""
        return any("left_out" not in pair for pair in self.pairs)


def group_comparisons(entries: Sequence[Entry]) -> list[Comparison]:
    """Return the entries of :func:`compare_models` by dataset, mask and first model."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        about = entry["dataset"]
        if entry["has_llm"]:
            about += f", {entry['image_attention']}"
        groups.setdefault((about, entry["first"]), []).append(entry)
    return [Comparison(*key, pairs) for key, pairs in groups.items()]


# ------------------------------------------------------------------------------------------------ sentences
def describe_comparison(entry: Entry) -> list[str]:
    """Return sentences about two models: their best layers, sites and classes that differ, missing certificates."""
    if "left_out" in entry:
        return [entry["left_out"]]
    lines = [_describe_best(entry)] if entry["best"] else []
    differing = [entry["site"] for entry in entry["sites"] if differs(entry)]
    # the sentence about best layers has said which two models
    which = "" if entry["best"] else f" ({entry['second']} − {entry['first']})"
    lines.append(f"Sites that differ, by themselves{which}: {', '.join(differing) or 'none'}.")
    if entry["classes"]:
        lines.append(_describe_classes(entry["classes"]))
    unconverged = entry["unconverged"]
    sites = [
        f"{site} of {entry[model]}" for model in ("first", "second") for site in unconverged[model]
    ]
    if sites:
        lines.append(
            f"Not shown to be at the optimum (no certificate of convergence): {', '.join(sites)}. "
            "Differences there may be those of the solver."
        )
    return lines


def _describe_classes(classes: Sequence[Entry]) -> str:
    """Return which classes are read better or worse at the best layers."""
    found = sorted(filter(class_differs, classes), key=lambda x: -abs(x["difference"]))
    if not found:
        return f"IoU at the best layers: none of {len(classes)} classes is shown to differ."
    text = ", ".join(f"{x['class']} {_format_difference(x)}" for x in found[:NAMED_CLASSES])
    most = "most: " * (len(found) > NAMED_CLASSES)
    return (
        f"IoU at the best layers differs in {len(found)} of {len(classes)} classes: {most}{text} points "
        "(tested together)."
    )


def _describe_best(entry: Entry) -> str:
    """Return which model reads more at its best layer."""
    first = entry["first"]
    second = entry["second"]
    best = entry["best"]
    said = f"No difference between {second} and {first} is shown"
    if differs(best):
        more = "more" if best["difference"] > 0 else "less"
        said = f"{second} reads {more} than {first}"
    layers = f"best layers: {best['site']} of {first}, {best['second_site']} of {second}"
    return f"{said}: {_format_difference(best)} points of mIoU ({layers}; the interval holds whichever are best)."


def _format_difference(row: Entry) -> str:
    return f"{format_points(row['difference'])} {format_interval(row['ci95'])}"


# ------------------------------------------------------------------------------------------------ tables
def pair_table(entry: Entry) -> list[Cells]:
    """Return the table of two models: sites, then best layers; [] of two that are not compared."""
    if "left_out" in entry:
        return []
    rows = []
    for row in entry["sites"]:
        other = f", {row['second_site']}" * (row["site"] != row["second_site"])
        rows.append(_pair_cells(entry, row["site"] + other, row))
    if best := entry["best"]:
        layers = [best["site"], best["second_site"]]
        name = f"{BEST_LAYER} ({', '.join(dict.fromkeys(layers))})"
        rows.append(_pair_cells(entry, name, best))
    return rows


def classes_of_pair(entry: Entry) -> list[Cells]:
    """Return the IoU of each class at the best layers of two models, the greatest difference first."""
    classes = sorted(entry.get("classes", []), key=lambda x: -abs(x["difference"]))
    return [
        {"class": x["class"]} | _score_cells(entry, x) | {"p": format_p(x["p_corrected"])}
        for x in classes
    ]


def _pair_cells(entry: Entry, site: str, row: Entry) -> Cells:
    return {"site": site} | _score_cells(entry, row)


def _score_cells(entry: Entry, row: Entry) -> Cells:
    return {
        entry["first"]: format_percent(row["first"]),
        entry["second"]: format_percent(row["second"]),
        "difference": _format_difference(row),
    }


def table_of_all(comparison: Comparison) -> list[Cells]:
    """Return the table of three models or more: the score of each at the first one's sites, and its difference there.

    A cell names the layer where it is not the first model's. [] of two models.
    """
    compared = [pair for pair in comparison.pairs if "left_out" not in pair]
    if len(compared) < 2:
        return []
    rows: dict[str, Cells] = {}
    for pair in compared:
        for row in pair["sites"]:
            cells = rows.setdefault(row["site"], {"site": row["site"]})
            _add_cells(cells, pair, row, is_named=row["site"] != row["second_site"])
    order = {site: i for i, site in enumerate(_sites_in_order(compared))}
    best: Cells = {"site": BEST_LAYER}
    for pair in compared:
        if pair["best"]:
            _add_cells(best, pair, pair["best"], is_named=True)
            best[pair["first"]] += f" ({pair['best']['site']})"
    shown = [rows[site] for site in sorted(rows, key=order.__getitem__)]
    shown += [best] if len(best) > 1 else []
    titles = list(dict.fromkeys(title for cells in shown for title in cells))
    return [{title: cells.get(title, "–") for title in titles} for cells in shown]


def _add_cells(
    cells: Cells,
    pair: Entry,
    row: Entry,
    is_named: bool,
) -> None:
    """Add the scores of a pair at a site to its row, and their difference; the second one's site if it is named."""
    cells[pair["first"]] = format_percent(row["first"])
    cells[pair["second"]] = format_percent(row["second"]) + f" ({row['second_site']})" * is_named
    cells[f"{pair['second']} − {pair['first']}"] = _format_difference(row)


def _sites_in_order(pairs: Sequence[Entry]) -> list[str]:
    """Return the first model's sites that any pair is compared at, in forward order.

    Each pair has them in this order. A site that one pair lacks comes before the next one of another pair.
    """
    order: list[str] = []
    for pair in pairs:
        place = 0
        for row in pair["sites"]:
            if row["site"] in order:
                place = order.index(row["site"]) + 1
            else:
                order.insert(place, row["site"])
                place += 1
    return order

