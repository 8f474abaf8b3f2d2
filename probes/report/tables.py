"""The tables that a report consists of: all that page, terminal, CSV files and notebooks show are selections.

A new claim is a row in its analysis, a new view a function of a table; nothing else knows of either.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import cycle
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from pandas import DataFrame

from probes.heads import LINEAR
from probes.runs.formatting import Entry, bounds
from probes.runs.study import StudyRuns, head_suffix

from .compare import difference_rows
from .position import position_rows
from .sites import certificates_of, class_rows, draw_rows, run_columns, selection_rows, site_rows
from .verdicts import VERDICT_COLUMNS

KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST_LABEL = 16
UNTOLD = ("", "hf", "trained", "checkpoint", "model")  # parts of paths
UNTRAINED = "untrained"  # the column of claims that has the number of the model before training


class Tables(NamedTuple):
    """All tables of a report.

    Scores and differences are fractions 0..1, of other tasks than segmentation in the unit of their score; what does
    not exist is NaN or None. `model` is a key of `models`. Rows are in the order of the command, of the masks (causal
    first), then of sites from the pixels to the output.

    Args:
        models: key ("A", "B", ...), name (that tells models apart), label (at most 16 characters), about (what else is
            known of it, or ""), path, has_llm, last_layer.
        claims: A row for each claim, mask, model, task, data, seed and column: "paper", "optimum", "beyond_random",
            and "untrained", the number of the model before training. Of the column: value, low, high, verdict,
            reason (why it is untested), detectable, random (mean of the draws), control (kind of draws beyond which
            the claim fares worst), below_optimum with below_low and below_high. Of the claim, in each row: title,
            what (is subtracted from what), conclusion, finding (after correction for all claims), would_show (if
            undecided), p, p_holm, truth, images, patches, seeds. Claims joint over seeds have no seed, and their
            number in "seeds"; all others have seeds 1.
        sites: A row for each run, site and metric: model, mask, task, data, weights ("trained", or the control), draw,
            seed, probes ("solved" or "trained"), main (whether the report is about this run), site, metric, value, low,
            high. Main scores of main runs also have random, draws (their number), minus_random, minus_low and
            minus_high: the difference from random models, over images and draws.
        differences: A row for each difference, the second minus the first: of ("site", "effect", "best layer", "class",
            or "left out" with the reason as name), between ("models" with keys, or "masks" of `model`), first, second,
            mask, task, data, seed, name, site, second_site, first_value, second_value, difference, low, high, p (sites:
            of those with a depth together; classes together), photos (of a class; without p if they are too few). Of
            sites, best layers and classes also finding and detectable (probes/report/best_layers.py), of best layers
            p_holm.
        draws: The main score of each draw at the sites that it changes: model, mask, task, data, weights (random,
            permuted or adapter), draw, seed, site, metric, value.
        classes: IoU by class at the sites of main runs: model, mask, data, seed, site, class, iou, photos.
        position: Position alone beside each main run and metric: model, mask, task, data, weights, draw, seed, probes,
            grid, metric, value, low, high, converged; site and best, the best score; share, how much of it position
            alone has, of errors the other way round.
        selection: Of each trained probe of a model that was validated more than once: model, mask, task, data, weights,
            draw, seed, site, metric, optimum (of the solved probe beside it), best and last (of its validations), their
            number, and selection, what choosing the best one adds.
        certificates: Of each solved probe: model, mask, task, data, weights, draw, seed, site, strength, at_end (the
            cross-validated loss is lowest at an end of the path), gradient, converged.
    """

    models: DataFrame
    claims: DataFrame
    sites: DataFrame
    differences: DataFrame
    draws: DataFrame
    classes: DataFrame
    position: DataFrame
    certificates: DataFrame
    selection: DataFrame


RUN = "model mask task data weights draw seed probes"
NAMES = {  # of the columns of each table
    name: columns.split()
    for name, columns in {
        "models": "key name label about path has_llm last_layer",
        "claims": "claim title what model mask task data seed seeds column value low high verdict reason detectable "
        "random control below_optimum below_low below_high conclusion finding would_show p p_holm truth images patches",
        "sites": f"{RUN} main site metric value low high random draws minus_random minus_low minus_high",
        "differences": "of between first second model mask task data seed name site second_site first_value "
        "second_value difference low high p p_holm finding detectable photos",
        "draws": f"{RUN} site metric value",
        "classes": f"{RUN} site class iou photos",
        "position": f"{RUN} grid metric value low high site best share converged",
        "certificates": f"{RUN} site strength at_end gradient converged",
        "selection": f"{RUN} site metric optimum best last validations selection",
    }.items()
}


def make_tables(
    studies: Sequence[StudyRuns], claims: Sequence[list[Entry]], joint: Sequence[Entry] = ()
) -> Tables:
    """Return the tables of a report.

    Args:
        studies: In the order given.
        claims: Of each study, from :func:`probes.report.claims.evaluate_claims`.
        joint: Claims over seeds, from :func:`probes.report.claims.joint_studies`.
    """
    models = name_models(studies)
    keys = models.set_index("name")["key"].to_dict()
    rows: dict[str, list[Entry]] = {name: [] for name in NAMES}
    for study, of_study in zip(studies, claims, strict=True):
        key = keys[study.name]
        about = {
            "model": key,
            "task": study.task.name,
            "data": study.dataset,
            "seed": study.first.metrics["seed"],
        }
        rows["claims"] += [row for claim in of_study for row in _claim_rows(about, claim)]
        rows["sites"] += site_rows(study, key)
        rows["draws"] += draw_rows(study, key)
        rows["classes"] += class_rows(study, key)
        rows["position"] += position_rows(study, key)
        for run in study.members:
            about_run = run_columns(study, run, key)
            rows["certificates"] += [about_run | row for row in certificates_of(run)]
            rows["selection"] += [about_run | row for row in selection_rows(study, run)]
    for entry in joint:
        about = {"model": keys[entry["model"]], "task": entry["task"], "data": entry["dataset"]}
        rows["claims"] += [row for claim in entry["claims"] for row in _claim_rows(about, claim)]
    rows["differences"] += difference_rows(studies, keys)
    made = {name: DataFrame(rows[name], columns=NAMES[name]) for name in NAMES}
    return Tables(**made | {"models": models})


def _claim_rows(about: Entry, claim: Entry) -> Iterator[Entry]:
    """Yield the rows of a claim, one for each column."""
    title, _, what = claim["text"].partition(": ")
    about = about | {
        "mask": claim["image_attention"],
        "title": title,
        "what": what,
        "seeds": claim["n"].get("seeds", 1),
        "images": claim["n"].get("images"),
        "patches": claim["n"].get("patches"),
    }
    for key in ("claim", "conclusion", "finding", "p", "p_holm", "truth"):
        about[key] = claim.get(key)
    about["would_show"] = claim.get("detectable")
    columns = {name: claim["verdicts"][name] for name in VERDICT_COLUMNS}
    if claim.get("control"):
        columns[UNTRAINED] = claim["control"]
    for name, column in columns.items():
        row = about | {"column": name, "random": None}
        if draws := column.get("by_draw"):
            row["random"] = sum(draws) / len(draws)
        for key in ("value", "verdict", "reason", "detectable", "control"):
            row[key] = column.get(key)
        row |= bounds(column["ci95"])
        if below := column.get("below_optimum"):
            row |= {"below_optimum": below["value"]} | bounds(below["ci95"], "below_")
        yield row


def by_claim(claims: DataFrame) -> DataFrame:
    """Return a row for each claim: its effect, what is left beyond random models, and the verdict of each column.

    The effect, "value", "low" and "high", is that at the optimum if it was measured there; of what is beyond random
    models: beyond_value, beyond_low, beyond_high, beyond_verdict, random and control.
    """
    parts = {}
    for name in VERDICT_COLUMNS:
        of_column = claims[claims["column"] == name]
        parts[name] = of_column.reset_index(drop=True)
    table = parts["optimum"].drop(columns=["column", "random", "control", "verdict"])
    numbers = ["value", "low", "high"]
    is_measured = table["low"].notna()
    table[numbers] = table[numbers].where(is_measured, parts["paper"][numbers])
    for name in VERDICT_COLUMNS:
        table[f"{name}_verdict"] = parts[name]["verdict"]
    beyond = parts["beyond_random"]
    table[[f"beyond_{key}" for key in numbers]] = beyond[numbers]
    table[["random", "control"]] = beyond[["random", "control"]]
    return table


# ------------------------------------------------------------------------------------------------ names
def name_models(studies: Sequence[StudyRuns]) -> DataFrame:
    """Return the table of models, in the order given."""
    first: dict[str, StudyRuns] = {}
    for study in studies:
        first.setdefault(study.name, study)
    paths = [study.first.metrics["mllm"] for study in first.values()]
    telling_names = []
    for (name, study), path in zip(first.items(), paths, strict=True):
        name = name.removesuffix(head_suffix(study.first))
        # a checkpoint that records no name of itself is called by its path
        if name == Path(path).name:
            name = path
        telling_names.append(name)
    labels = shorten_labels(telling_names)
    rows = []
    for key, label, path, study in zip(cycle(KEYS), labels, paths, first.values(), strict=False):
        label += head_suffix(study.first)
        about = study.first.training.get("about")  # what a checkpoint records of itself
        if not about:
            about = study.name
            if study.name in path:
                about = path
        if study.first.head != LINEAR:
            about = f"{study.first.head} probes, trained"
        if about == label:
            about = ""
        row = {
            "key": key,
            "name": study.name,
            "label": label,
            "about": about,
            "path": path,
            "has_llm": study.first.has_llm,
            "last_layer": study.first.last_layer,
        }
        rows.append(row)
    return DataFrame(rows, columns=NAMES["models"])


def shorten_labels(names: Sequence[str]) -> list[str]:
    """Return labels of at most 16 characters: the last telling part of a path, without what all names share.

    Two may be equal: keys tell models apart.
    """
    words = [_last_part(name).replace("_", " ").split() for name in names]
    for _ in ("starts", "ends"):
        shared = 0
        if len(words) > 1:
            fewest = min(map(len, words)) - 1
            shared = min(fewest, len(commonprefix(words)))
        words = [of_name[shared:][::-1] for of_name in words]
    labels = [" ".join(of_name) for of_name in words]
    return list(map(_shorten, labels))


def _last_part(name: str) -> str:
    """Return the last part of a path or module that tells something, without what every export's name ends with."""
    if not re.search("[/:]", name):
        return name
    parts = [part for part in re.split("[/:]", name) if part not in UNTOLD]
    *_, last = parts or [name]
    return re.sub(r"([-_.](hf|instruct|chat))+$", "", last, flags=re.I)


def _shorten(label: str) -> str:
    if len(label) <= LONGEST_LABEL or " " in label:
        return textwrap.shorten(label, LONGEST_LABEL, placeholder="…")
    start = label[: LONGEST_LABEL - 5].rstrip(" -_")
    end = label[-4:].lstrip(" -_")
    return f"{start}…{end}"
