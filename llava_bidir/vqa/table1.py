"""`llava-bidir vqa-table`: Table 1 beside the paper's, with intervals and paired tests, as JSON, CSV and text.

Scores are fractions, except for MME's points. The text shows percent.
"""

import csv
import io
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

from llava_bidir.command_options import VQATableOptions
from llava_bidir.common.bootstrap import RESAMPLINGS, holm, interval
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json, write_files

from .scores import BENCHMARKS, SWAPS, ScoreTerms, swap_test

COLUMNS = {title: x for benchmark in BENCHMARKS.values() for title, x in benchmark.columns.items()}
SHOWN = ("score", "difference", "low", "high", "paper", "p", "p_holm")
SEED = 0


def run(options: VQATableOptions) -> None:
    """Run `llava-bidir vqa-table`."""
    print(write_tables(options.results, options.out))


def write_tables(folders: list[Path], out: Path) -> str:
    """Write OUT/table1.{csv,json} from finished folders of `llava-bidir vqa` and return the table as text.

    Raises:
        UserError: A folder has no results or those of several checkpoints, or two models were asked other questions.
    """
    paper = json.loads(Path(__file__).with_name("paper.json").read_text())
    read = [_read_model(folder, paper) for folder in folders]
    models = [model for model, *_ in read]
    pairs = [
        _compare(a, b)
        for a, b in product(read, repeat=2)
        if a[0]["encoder"] == b[0]["encoder"]
        and [x[0]["image_attention"] for x in (a, b)] == ["causal", "bidirectional"]
    ]
    table = {"models": models, "pairs": pairs, "paper": paper["source"]}
    table |= {"resamplings": RESAMPLINGS, "swaps": SWAPS, "seed": SEED}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["encoder", "image_attention", "column", *SHOWN])
    lines = [" " * 46 + "".join(f"{name:>11}" for name in SHOWN)]
    for x, title in [(row, title) for row in models + pairs for title in row["columns"]]:
        cell = x["columns"][title]
        values = dict(zip(("low", "high"), cell["ci95"], strict=True)) | cell
        values = {name: values.get(name) for name in SHOWN}
        writer.writerow([x["encoder"], x["image_attention"], title, *values.values()])
        shown = "".join(f"{_format(title, *value):>11}" for value in values.items())
        lines.append(f"{x['encoder'] + ' ' + x['image_attention']:<33} {title:<12}{shown}")
    write_files({out / "table1.csv": file.getvalue(), out / "table1.json": table})
    return "\n".join(lines)


def _format(title: str, name: str, value: float | None) -> str:
    """Return a number of the table as points, percent or a p-value."""
    if value is None or name.startswith("p_") or name == "p":
        return "–" if value is None else f"{value:.3f}"
    return f"{value:.0f}" if COLUMNS[title].categories else f"{100 * value:.1f}"


def _read_model(folder: Path, paper: dict) -> tuple[dict, dict[str, ScoreTerms], dict[str, list]]:
    """Return the row of a model, and by column the terms of its score and what it was asked."""
    files = {name: folder / f"{name}.json" for name in BENCHMARKS}
    infos = {name: read_json(file) for name, file in files.items() if file.exists()}
    if len({info["fingerprint"] for info in infos.values()}) != 1:
        raise UserError(
            f"{folder} has results of {len(infos)} tasks; expected one or more, of one checkpoint"
        )
    model = next(iter(infos.values()))
    published = paper.get(model["encoder"], {}).get(model["image_attention"], {})
    terms, asked, columns = {}, {}, {}
    for name in infos:
        items = [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]
        for title, column in BENCHMARKS[name].columns.items():
            terms[title] = column.terms(items)
            asked[title] = [[x[k] for k in ("item", "unit", "question", "target")] for x in items]
            score = terms[title].score()
            resampled = terms[title].resampled_scores(seed=SEED)
            scale, highest = (1, math.inf) if column.categories else (100, 1.0)
            number = published.get(column.paper)
            columns[title] = {
                "score": score,
                "ci95": interval(score, resampled, lowest=0.0, highest=highest),
                "paper": number and number / scale,
                "difference": number and score - number / scale,
            }
    keys = ("model", "encoder", "image_attention", "fingerprint", "dtype")
    about = {key: model[key] for key in keys} | {"results": str(folder)}
    return about | {"columns": columns}, terms, asked


def _compare(a: tuple, b: tuple) -> dict[str, Any]:
    """Compare bidirectional (b) with causal (a) on the same questions; p-values are adjusted for the columns."""
    columns = {}
    for title in (title for title in COLUMNS if title in a[1] and title in b[1]):
        if a[2][title] != b[2][title] or a[0]["dtype"] != b[0]["dtype"]:
            folders = f"{a[0]['results']} and {b[0]['results']}"
            raise UserError(f"{title}: {folders} differ in more than the mask: questions or dtype")
        difference = b[1][title].score() - a[1][title].score()
        resampled = [x[1][title].resampled_scores(seed=SEED) for x in (b, a)]
        paper = [x[0]["columns"][title]["paper"] for x in (b, a)]
        columns[title] = {
            "difference": difference,
            "ci95": interval(difference, resampled[0] - resampled[1]),
            "paper": None if None in paper else paper[0] - paper[1],
            "p": swap_test(a[1][title], b[1][title], seed=SEED),
        }
    for cell, p in zip(columns.values(), holm([x["p"] for x in columns.values()]), strict=True):
        cell["p_holm"] = p
    masks = "bidirectional - causal"
    return {"encoder": a[0]["encoder"], "image_attention": masks, "columns": columns}
