"""The content of results.json: metrics of runs, verdicts and differences of models, for other tools."""

from collections.abc import Mapping, Sequence
from typing import Any

from probes.data.label_counts import notes_of_run
from probes.runs.finished_run import FinishedRun
from probes.runs.formatting import Entry
from probes.runs.study import UNTRAINED, StudyRuns, by_mask
from probes.tasks import SEGMENTATION

from .compare import LEFT_OUT
from .tables import Tables
from .verdicts import MARGIN


def report_results(
    studies: Sequence[StudyRuns],
    claims: Sequence[list[Entry]],
    joint: Sequence[Entry],
    tables: Tables,
    added: Sequence[Entry] = (),
) -> Entry:
    """Return the content of results.json.

    Its entries are those of the study itself, or, of several models, data sets or seeds, of each in "studies". Studies
    of other tasks are in "tasks".

    Args:
        studies: Of all tasks, those of segmentation first.
        claims: Of each study.
        joint: Over seeds.
        tables: Of the report.
        added: What analyses add to each study: {"results": ..., "by_mask": ...}.
    """
    labels = dict(
        zip(
            dict.fromkeys(x.name for x in studies),
            tables.models["label"],
            strict=True,
        )
    )
    none: Sequence[Entry] = [{}] * len(studies)
    entries = [
        study_results(
            study,
            labels[study.name],
            of_study,
            more,
        )
        for study, of_study, more in zip(
            studies,
            claims,
            added or none,
            strict=True,
        )
    ]
    main = [
        x
        for x, study in zip(
            entries,
            studies,
            strict=True,
        )
        if study.task.name == SEGMENTATION
    ]
    several = {
        "seed": main[0]["seed"],
        "studies": main,
    }
    results = {
        "margin": MARGIN,
        "models": tables.models.to_dict("records"),
    }
    results |= main[0] if len(main) == 1 else several
    if joint:
        results["joint"] = [entry | {"model": labels[entry["model"]]} for entry in joint]
    if len(main) < len(entries):
        results["tasks"] = entries[len(main) :]
    return results | {"comparisons": comparisons(tables)}


def study_results(
    study: StudyRuns,
    label: str,
    claims: list[Entry],
    added: Mapping[str, Any],
) -> Entry:
    """Return the entries of one model on one data set."""
    masks = {
        mask: {
            "probing": run.metrics,
            "answer_accuracy": run.training.get("val/answer_accuracy"),  # None if not recorded
        }
        for mask, run in study.main_runs.items()
    }
    for name, found in added.get("by_mask", {}).items():
        for mask, entry in masks.items():
            entry[name] = found[mask]
    random: dict[str, list[Entry]] = {}
    for run in _random_controls(study):
        random.setdefault(run.mask, []).append({"probing": run.metrics})
    first = study.first
    return {
        "model": label,
        "dataset": study.dataset,
        "task": study.task.name,
        "has_llm": first.has_llm,
        "seed": first.metrics["seed"],
        "masks": masks,
        "controls": {
            "untrained": {mask: {"probing": run.metrics} for mask, run in study.untrained.items()},
            "random": random,
        },
        "claims": claims,
        "data_notes": notes_of_run(first.metrics.get("classes", []), first.manifest["data"]),
        **added.get("results", {}),
    }


def _random_controls(study: StudyRuns) -> list[FinishedRun]:
    """Return the controls beside the untrained model: its further draws, random adapters, random and permuted LLMs."""
    untrained = [
        *by_mask(study.where(arm=UNTRAINED, solved=True)).values(),
        *study.untrained.values(),
    ]
    others = [run for run in study.members if run.arm != "trained" and run not in untrained]
    return sorted(others, key=lambda run: not run.is_solved)


def comparisons(tables: Tables) -> list[Entry]:
    """Return the differences of two models, b minus a, in points: of sites, best layers, and classes at these.

    Each has "dataset", "image_attention", "of", the labels "a" and "b", "site_a", "site_b", "value" and "ci95"; that of
    a class also "class", "photos" and "p_corrected", None if it is in too few photos to be tested.
    """
    labels = dict(
        zip(
            tables.models["key"],
            tables.models["label"],
            strict=True,
        )
    )
    rows = tables.differences
    rows = rows[(rows["between"] == "models") & (rows["task"] == SEGMENTATION)]
    found = []
    for row in rows.itertuples():
        if row.of in (LEFT_OUT, "effect"):
            continue
        entry = {
            "dataset": row.data,
            "image_attention": row.mask,
            "of": row.of,
            "a": labels[row.first],
            "b": labels[row.second],
            "site_a": row.site,
            "site_b": row.second_site,
            "value": 100 * row.difference,
            "ci95": [100 * row.low, 100 * row.high],
        }
        if row.of == "class":
            entry |= {
                "class": row.name,
                "photos": int(row.photos),
                "p_corrected": None if row.p != row.p else row.p,
            }
        found.append(entry)
    return found
