"""Table 1 of one or many checkpoints beside the paper's, with intervals and paired tests: JSON, CSV, LaTeX and HTML.

Scores are fractions, MME's are points; what people read (LaTeX, HTML, the terminal) shows percent.
"""

import argparse
import csv
import io
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llava_bidir.common.errors import UserError

from .benchmarks import BENCHMARKS, Column, Parts
from .bootstrap import RESAMPLINGS, SWAPS, bootstrap, holm, interval, swap_test
from .result_files import read_results, results_file
from .validate_results import unusable

HERE = Path(__file__).parent
COLUMNS: dict[str, Column] = {title: column for b in BENCHMARKS.values() for title, column in b.columns.items()}
MASKS = ("causal", "bidirectional")
SEED = 0

Results = dict[str, tuple[dict, list]]  # benchmark -> facts, items


def run(args: argparse.Namespace) -> None:
    """`llava-bidir vqa-table`."""
    print(write_tables(args.results, args.out))


def write_tables(folders: list[Path], out: Path) -> str:
    """Writes OUT/table1.{json,csv,tex,html} of finished folders of `llava-bidir vqa`; returns it as text.

    Raises:
        UserError: A folder has no results, or those of one model are of several checkpoints.
    """
    results = [_read(folder) for folder in folders]
    models = [_model(folder, found) for folder, found in zip(folders, results, strict=True)]
    table = {
        "models": models,
        "pairs": [_pair(models, results, i, j) for i, j in _pairs(models)],
        "paper": json.loads((HERE / "paper.json").read_text())["source"],
        **{"resamplings": RESAMPLINGS, "swaps": SWAPS, "seed": SEED},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "table1.json").write_text(json.dumps(table, indent=1) + "\n")
    (out / "table1.csv").write_text(_csv(table))
    (out / "table1.tex").write_text(_latex(table))
    pages = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = pages.get_template("table1.html.j2")
    (out / "table1.html").write_text(page.render(table=table, titles=_titles(table), shown=shown, signed=signed))
    return _text(table)


def _read(folder: Path) -> Results:
    found = {name: read_results(folder, name) for name in BENCHMARKS if results_file(folder, name).exists()}
    if not found:
        raise UserError(f"{folder} has no results of `llava-bidir vqa`; expected files such as {folder}/gqa.json")
    if len({facts["fingerprint"] for facts, _ in found.values()}) > 1:
        raise UserError(f"{folder} has results of several checkpoints; delete those that are not wanted")
    return found


def _parts(results: Results) -> dict[str, Parts]:
    """The parts of each column."""
    return {
        title: column.parts(items)
        for name, (_, items) in results.items()
        for title, column in BENCHMARKS[name].columns.items()
    }


def _model(folder: Path, results: Results) -> dict[str, Any]:
    """A row: of each column the score with its interval, and the paper's."""
    first, parts = next(iter(results.values()))[0], _parts(results)
    paper = json.loads((HERE / "paper.json").read_text()).get(first["encoder"], {}).get(first["image_attention"], {})
    columns = {}
    for name, (facts, items) in results.items():
        for title, column in BENCHMARKS[name].columns.items():
            score, printed = parts[title].score(), paper.get(column.paper)
            printed = printed if printed is None or column.points else printed / 100
            columns[title] = {
                "score": score,
                "ci95": interval(bootstrap([parts[title]], seed=SEED)[0]),
                "paper": printed,
                "difference": None if printed is None else score - printed,
                "items": len(items),
                "units": len(parts[title].units),
                "unusable": len(unusable(name, items)) / len(items),
                "official": BENCHMARKS[name].items in (None, facts["documents"]),
            }
    kept = ("model", "encoder", "image_attention", "fingerprint")
    return {**{key: first[key] for key in kept}, "results": str(folder), "columns": columns}


def _pairs(models: list[dict]) -> list[tuple[int, int]]:
    """Causal and bidirectional models with the same encoder."""
    return [
        (i, j)
        for (i, a), (j, b) in product(enumerate(models), repeat=2)
        if (a["image_attention"], b["image_attention"]) == MASKS and a["encoder"] == b["encoder"]
    ]


def _pair(models: list[dict], results: list[Results], i: int, j: int) -> dict[str, Any]:
    """Bidirectional minus causal on the same questions; p values of its columns are adjusted together."""
    _same_questions(models[i], models[j], results[i], results[j])
    causal, other = _parts(results[i]), _parts(results[j])
    columns = {}
    for title in causal.keys() & other.keys():
        pair = [causal[title], other[title]]
        scores = bootstrap(pair, seed=SEED)
        printed = [models[k]["columns"][title]["paper"] for k in (i, j)]
        columns[title] = {
            "difference": pair[1].score() - pair[0].score(),
            "ci95": interval(scores[1] - scores[0]),
            "p": swap_test(*pair, seed=SEED),
            "paper": None if None in printed else printed[1] - printed[0],
        }
    columns = {title: columns[title] for title in COLUMNS if title in columns}
    for entry, adjusted in zip(columns.values(), holm([entry["p"] for entry in columns.values()]), strict=True):
        entry["p_holm"] = adjusted
    return {"encoder": models[i]["encoder"], "causal": i, "bidirectional": j, "columns": columns}


def _same_questions(first: dict, second: dict, ours: Results, theirs: Results) -> None:
    for name in ours.keys() & theirs.keys():
        asked = [
            [(i["item"], i["unit"], i["question"], i["target"]) for i in found[name][1]] for found in (ours, theirs)
        ]
        if asked[0] != asked[1]:
            raise UserError(f"{name}: {first['results']} and {second['results']} were not asked the same questions")


def _titles(table: dict) -> list[str]:
    """The columns that some model has, in the paper's order."""
    return [title for title in COLUMNS if any(title in model["columns"] for model in table["models"])]


def shown(title: str, value: float | None) -> str:
    """A score as people read it: percent with a decimal, or points."""
    if value is None:
        return "–"
    return f"{value:.0f}" if COLUMNS[title].points else f"{100 * value:.1f}"


def signed(title: str, value: float | None) -> str:
    return "–" if value is None else ("+" if value >= 0 else "−") + shown(title, abs(value))


def _csv(table: dict) -> str:
    """A line a model and column, and a line a pair and column."""
    head = ["what", "model", "encoder", "image_attention", "column", "value", "low", "high", "paper", "p", "p_holm"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*head, "items", "units", "unusable", "official"])
    for model in table["models"]:
        for title, c in model["columns"].items():
            who = ["score", model["model"], model["encoder"], model["image_attention"], title]
            rest = [c["items"], c["units"], c["unusable"], c["official"]]
            writer.writerow([*who, c["score"], *c["ci95"], c["paper"], "", "", *rest])
    for pair in table["pairs"]:
        for title, c in pair["columns"].items():
            who = ["difference", table["models"][pair["bidirectional"]]["model"], pair["encoder"], "", title]
            writer.writerow([*who, c["difference"], *c["ci95"], c["paper"], c["p"], c["p_holm"], "", "", "", ""])
    return file.getvalue()


def _rows(table: dict) -> list[tuple[str, str, list[str]]]:
    """(name, what, cells) of every line: four for a model, four for a pair."""
    lines = []
    for model in table["models"]:
        name = f"{model['encoder']} {model['image_attention']}"
        kinds = {"ours": (shown, "score"), "95%": (shown, "ci95"), "paper": (shown, "paper")}
        lines += [(name, model["columns"], kinds | {"ours - paper": (signed, "difference")})]
    for pair in table["pairs"]:
        name = f"{pair['encoder']} bidirectional - causal"
        kinds = {"ours": (signed, "difference"), "95%": (signed, "ci95"), "paper": (signed, "paper")}
        lines += [(name, pair["columns"], kinds | {"p (Holm)": (lambda title, p: f"{p:.3f}", "p_holm")})]
    return [
        (name, what, [_cell(title, columns.get(title), show, key) for title in _titles(table)])
        for name, columns, kinds in lines
        for what, (show, key) in kinds.items()
    ]


def _cell(title: str, column: dict | None, show: Callable[[str, Any], str], key: str) -> str:
    if column is None:
        return "–"
    value = column[key]
    return " to ".join(show(title, end) for end in value) if isinstance(value, list) else show(title, value)


def _text(table: dict) -> str:
    lines = [("", "", _titles(table)), *_rows(table)]
    width = [max(len(line[k]) for line in lines) for k in (0, 1)]
    return "\n".join(
        f"{name:<{width[0]}}  {what:<{width[1]}}  " + "  ".join(f"{cell:>14}" for cell in cells)
        for name, what, cells in lines
    )


def _latex(table: dict) -> str:
    """For the booktabs package."""
    titles = _titles(table)
    body = [" & ".join(["", "", *titles])] + [" & ".join([name, what, *cells]) for name, what, cells in _rows(table)]
    body = [
        line.replace("−", "$-$").replace("–", "--").replace("_", r"\_").replace("%", r"\%") + r" \\" for line in body
    ]
    head = rf"\begin{{tabular}}{{ll{'r' * len(titles)}}}"
    return "\n".join([head, r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}", ""])
