"""`llava-bidir vqa-table`: Table 1 beside the paper's, with intervals and paired tests, as JSON, CSV and text.

Scores are fractions, except for MME's points. The text shows percent. Warnings name the benchmarks where the harness
cannot read an answer in a hundred: how a model writes its answers decides there, too.
"""

import csv
import io
import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from llava_bidir.command_options import VQATableOptions
from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.bootstrap import RESAMPLINGS, holm, interval
from llava_bidir.common.errors import UserError

from .benchmarks import BENCHMARKS, Column
from .result_files import read_results, results_file
from .scores import SWAPS, Item, ScoreTerms, swap_test

HERE = Path(__file__).parent
COLUMNS: dict[str, Column] = {
    title: column for b in BENCHMARKS.values() for title, column in b.columns.items()
}
MASKS = ("causal", "bidirectional")
SEED = 0
MOST_UNPARSED = 0.01

Results = dict[str, tuple[dict, list]]  # benchmark -> info, items


def run(options: VQATableOptions) -> None:
    """Run `llava-bidir vqa-table`."""
    print(write_tables(options.results, options.out))


def write_tables(folders: list[Path], out: Path) -> str:
    """Write OUT/table1.{csv,json} from finished folders of `llava-bidir vqa` and return the table as text.

    Raises:
        UserError: A folder has no results, invalid ones or those of several checkpoints, or two models were asked other
            questions. The message names the task and the item.
    """
    results = [_read_folder(folder) for folder in folders]
    models = [_score_model(folder, result) for folder, result in zip(folders, results, strict=True)]
    paper = json.loads((HERE / "paper.json").read_text())["source"]
    table = {
        "models": models,
        "pairs": [_compare(models, results, i, j) for i, j in _find_pairs(models)],
        "warnings": [
            text for pair in zip(models, results, strict=True) for text in _warnings(*pair)
        ],
        **{
            "paper": paper,
            "resamplings": RESAMPLINGS,
            "swaps": SWAPS,
            "seed": SEED,
        },
    }
    write_files({out / "table1.csv": _csv(table), out / "table1.json": table})
    return _text(table)


def _read_folder(folder: Path) -> Results:
    results = {
        name: read_results(folder, name)
        for name in BENCHMARKS
        if results_file(folder, name).exists()
    }
    if not results:
        raise UserError(
            f"{folder} has no results of `llava-bidir vqa`; expected files such as {folder}/gqa.json"
        )
    if len({info["fingerprint"] for info, _ in results.values()}) > 1:
        raise UserError(f"{folder} has results of several checkpoints; delete those of all but one")
    return results


def _score_terms(results: Results) -> dict[str, ScoreTerms]:
    """Return the score terms of each column."""
    return {
        title: column.terms(items)
        for name, (_, items) in results.items()
        for title, column in BENCHMARKS[name].columns.items()
    }


def _score_model(folder: Path, results: Results) -> dict[str, Any]:
    """Return a row of the table: the score, its interval and the paper's number for each column."""
    model = next(iter(results.values()))[0]
    terms = _score_terms(results)
    paper = (
        json.loads((HERE / "paper.json").read_text())
        .get(model["encoder"], {})
        .get(model["image_attention"], {})
    )
    columns = {}
    for name, (info, items) in results.items():
        for title, column in BENCHMARKS[name].columns.items():
            score = terms[title].score()
            published = paper.get(column.paper)
            published = published if published is None or column.points else published / 100
            highest = math.inf if column.points else 1.0
            columns[title] = {
                "score": score,
                "ci95": interval(
                    score, terms[title].resampled_scores(seed=SEED), lowest=0.0, highest=highest
                ),
                "paper": published,
                "difference": None if published is None else score - published,
                "items": len(items),
                "units": len(terms[title].units),
                "unusable": _unparsed(name, items),
                "official": BENCHMARKS[name].official_items in (None, info["documents"]),
            }
    keys = ("model", "encoder", "image_attention", "fingerprint")
    dtypes = sorted({str(info.get("dtype")) for info, _ in results.values()})
    return {
        **{key: model[key] for key in keys},
        "dtype": dtypes,
        "results": str(folder),
        "columns": columns,
    }


def _unparsed(name: str, items: list[Item]) -> float:
    """Return the share of answers that the harness cannot read."""
    return sum(not BENCHMARKS[name].is_parsed(item) for item in items) / len(items)


def _warnings(model: dict, results: Results) -> list[str]:
    """Return a sentence for each benchmark with more answers that the harness cannot read than `MOST_UNPARSED`."""
    shares = {name: _unparsed(name, items) for name, (_, items) in results.items()}
    return [
        f"{model['results']}: {share:.1%} of the answers to {name} {BENCHMARKS[name].unparsed}"
        for name, share in shares.items()
        if share > MOST_UNPARSED
    ]


def _find_pairs(models: list[dict]) -> list[tuple[int, int]]:
    """Return the indices of causal and bidirectional models with the same encoder."""
    return [
        (i, j)
        for (i, a), (j, b) in product(enumerate(models), repeat=2)
        if (a["image_attention"], b["image_attention"]) == MASKS and a["encoder"] == b["encoder"]
    ]


def _compare(
    models: list[dict],
    results: list[Results],
    i: int,
    j: int,
) -> dict[str, Any]:
    """Compare bidirectional (j) with causal (i) on the same questions. Adjust p-values for the tested columns."""
    if models[i]["dtype"] != models[j]["dtype"]:
        dtypes = [
            f"{model['results']} {', '.join(model['dtype'])}" for model in (models[i], models[j])
        ]
        raise UserError(f"results of other precisions are not compared: {' and '.join(dtypes)}")
    _check_same_questions(models[i], models[j], results[i], results[j])
    causal = _score_terms(results[i])
    bidirectional = _score_terms(results[j])
    columns = {}
    for title in (title for title in COLUMNS if title in causal and title in bidirectional):
        a = causal[title]
        b = bidirectional[title]
        published = [models[k]["columns"][title]["paper"] for k in (i, j)]
        difference = b.score() - a.score()
        columns[title] = {
            "difference": difference,
            "ci95": interval(
                difference, b.resampled_scores(seed=SEED) - a.resampled_scores(seed=SEED)
            ),
            "p": swap_test(a, b, seed=SEED) if COLUMNS[title].metric else None,
            "paper": None if None in published else published[1] - published[0],
        }
    tested = [column for column in columns.values() if column["p"] is not None]
    adjusted = iter(holm([column["p"] for column in tested]))
    for column in columns.values():
        column["p_holm"] = None if column["p"] is None else next(adjusted)
    return {
        "encoder": models[i]["encoder"],
        "causal": i,
        "bidirectional": j,
        "columns": columns,
    }


def _check_same_questions(
    a: dict,
    b: dict,
    results_a: Results,
    results_b: Results,
) -> None:
    for name in results_a.keys() & results_b.keys():
        questions = [
            [
                (item["item"], item["unit"], item["question"], item["target"])
                for item in results[name][1]
            ]
            for results in (results_a, results_b)
        ]
        if questions[0] != questions[1]:
            raise UserError(
                f"{name}: {a['results']} and {b['results']} were not asked the same questions"
            )


def _titles(table: dict) -> list[str]:
    """Return the columns that at least one model has, in the paper's order."""
    return [
        title for title in COLUMNS if any(title in model["columns"] for model in table["models"])
    ]


def format_score(title: str, value: float | None) -> str:
    """Return a score as points or as percent with one decimal."""
    if value is None:
        return "–"
    return f"{value:.0f}" if COLUMNS[title].points else f"{100 * value:.1f}"


def format_difference(title: str, value: float | None) -> str:
    """Return a difference of scores with its sign."""
    if value is None:
        return "–"
    sign = "+" if value >= 0 else "−"
    return sign + format_score(title, abs(value))


def _csv(table: dict) -> str:
    """Return one line per model and column, then one line per pair and column."""
    rows = []
    for what, entries in (("score", table["models"]), ("difference", table["pairs"])):
        for entry in entries:
            who = {key: value for key, value in entry.items() if isinstance(value, str)}
            for title, c in entry["columns"].items():
                low, high = c["ci95"]
                rows.append(
                    {
                        "what": what,
                        **who,
                        "column": title,
                        **c,
                        "low": low,
                        "high": high,
                    }
                )
    file = io.StringIO()
    names = dict.fromkeys(key for row in rows for key in row if key != "ci95")
    writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _rows(table: dict) -> list[tuple[str, str, list[str]]]:
    """Return (name, quantity, cells) of every line: five lines per model, four per pair."""
    score = format_score
    difference = format_difference
    blocks = []
    for model in table["models"]:
        lines = {
            "ours": (score, "score"),
            "95%": (score, "ci95"),
            "paper": (score, "paper"),
        }
        lines["ours - paper"] = (difference, "difference")
        lines["not parsed, %"] = (lambda title, share: f"{100 * share:.1f}", "unusable")
        blocks.append((f"{model['encoder']} {model['image_attention']}", model["columns"], lines))
    for pair in table["pairs"]:
        lines = {
            "ours": (difference, "difference"),
            "95%": (difference, "ci95"),
            "paper": (difference, "paper"),
        }
        lines["p (Holm)"] = (lambda title, p: "–" if p is None else f"{p:.3f}", "p_holm")
        blocks.append((f"{pair['encoder']} bidirectional - causal", pair["columns"], lines))
    return [
        (
            name,
            quantity,
            [_cell(title, columns.get(title), formatter, key) for title in _titles(table)],
        )
        for name, columns, lines in blocks
        for quantity, (formatter, key) in lines.items()
    ]


def _cell(
    title: str,
    column: dict | None,
    formatter: Callable[[str, Any], str],
    key: str,
) -> str:
    if column is None:
        return "–"
    value = column[key]
    if isinstance(value, list):
        return " to ".join(formatter(title, end) for end in value)
    return formatter(title, value)


def _text(table: dict) -> str:
    lines = [("", "", _titles(table)), *_rows(table)]
    width = [max(len(line[k]) for line in lines) for k in (0, 1)]
    rows = [
        f"{name:<{width[0]}}  {quantity:<{width[1]}}  " + "  ".join(f"{cell:>14}" for cell in cells)
        for name, quantity, cells in lines
    ]
    return "\n".join([*rows, *(f"Warning: {text}." for text in table["warnings"])])
