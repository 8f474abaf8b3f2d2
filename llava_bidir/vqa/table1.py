"""`llava-bidir vqa-table`: Table 1 beside the paper's, with intervals and paired tests, as JSON, CSV and text.

Scores are fractions, except for MME's points.
"""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from llava_bidir.command_options import VQATableOptions
from llava_bidir.common.bootstrap import RESAMPLINGS, holm, interval
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json, write_files

from .scores import BENCHMARKS, SWAPS, ScoreTerms, swap_test

COLUMNS = {title: x for benchmark in BENCHMARKS.values() for title, x in benchmark.columns.items()}
NUMBERS = ["value", "low", "high", "paper", "p", "p_holm"]
SEED = 0
Row = dict[str, Any]


class Results(NamedTuple):
    """Results of a checkpoint: settings; by column the terms of the score, what was asked, and the paper's score."""

    info: dict[str, Any]
    terms: dict[str, ScoreTerms]
    asked: dict[str, list[list]]
    paper: dict[str, float | None]


def run(options: VQATableOptions) -> None:
    """Run `llava-bidir vqa-table`."""
    print(write_tables(options.results, options.out))


def write_tables(folders: list[Path], out: Path) -> str:
    """Write OUT/table1.{csv,json} from finished folders of `llava-bidir vqa` and return the table as text.

    A row is a score of a model, or the difference of a bidirectional model from a causal one with the same encoder.

    Raises:
        UserError: A folder has no results or those of several checkpoints, or two models were asked other questions.
    """
    paper = json.loads(Path(__file__).with_name("paper.json").read_text())
    models = [read_results(folder, paper) for folder in folders]
    rows = [row for model in models for row in score_rows(model)]
    for a, b in product(models, repeat=2):
        masks = [model.info["image_attention"] for model in (a, b)]
        if a.info["encoder"] == b.info["encoder"] and masks == ["causal", "bidirectional"]:
            rows += pair_rows(a, b)
    table = pd.DataFrame(rows, columns=["encoder", "image_attention", "column", *NUMBERS])
    table = table.astype(dict.fromkeys(NUMBERS, float))
    about = {"resamplings": RESAMPLINGS, "swaps": SWAPS, "seed": SEED, "paper": paper["source"]}
    described = {"models": [model.info for model in models], "rows": rows, **about}
    write_files({out / "table1.csv": table.to_csv(index=False), out / "table1.json": described})
    return table.to_string(index=False, float_format="{:.3f}".format, na_rep="–")


def read_results(folder: Path, paper: dict) -> Results:
    """Return the results of the finished tasks in a folder."""
    files = {name: folder / f"{name}.json" for name in BENCHMARKS}
    tasks = {name: read_json(file) for name, file in files.items() if file.exists()}
    if len({task["fingerprint"] for task in tasks.values()}) != 1:
        raise UserError(
            f"{folder} has results of {len(tasks)} tasks; expected one or more, of one checkpoint"
        )
    first = next(iter(tasks.values()))
    keys = ("model", "encoder", "image_attention", "fingerprint", "dtype")
    info = {key: first[key] for key in keys} | {"results": str(folder)}
    results = Results(info, {}, {}, {})
    published = paper.get(info["encoder"], {}).get(info["image_attention"], {})
    for name, task in tasks.items():
        asked = [[x[key] for key in ("item", "unit", "question", "target")] for x in task["items"]]
        for title, column in BENCHMARKS[name].columns.items():
            results.terms[title] = column.terms(task["items"])
            results.asked[title] = asked
            number = published.get(column.paper)
            scale = 1 if number is None or column.categories else 100
            results.paper[title] = number and number / scale
    return results


def score_rows(results: Results) -> list[Row]:
    """Return a model's score by column, its 95% interval, and the paper's."""
    rows = []
    for title, terms in results.terms.items():
        highest = math.inf if COLUMNS[title].categories else 1.0
        resampled = terms.resampled_scores(seed=SEED)
        bounds = interval(terms.score(), resampled, lowest=0.0, highest=highest)
        rows.append(
            {
                "encoder": results.info["encoder"],
                "image_attention": results.info["image_attention"],
                "column": title,
                "value": terms.score(),
                "low": bounds[0],
                "high": bounds[1],
                "paper": results.paper[title],
            }
        )
    return rows


def pair_rows(a: Results, b: Results) -> list[Row]:
    """Compare bidirectional (b) with causal (a) on the same questions; p-values are adjusted for the columns."""
    rows = []
    for title in (title for title in a.terms if title in b.terms):
        if a.asked[title] != b.asked[title] or a.info["dtype"] != b.info["dtype"]:
            folders = f"{a.info['results']} and {b.info['results']}"
            raise UserError(f"{title}: {folders} differ in more than the mask: questions or dtype")
        terms = (a.terms[title], b.terms[title])
        papers = (a.paper[title], b.paper[title])
        paper = None if None in papers else papers[1] - papers[0]
        difference = terms[1].score() - terms[0].score()
        resampled = [x.resampled_scores(seed=SEED) for x in terms]
        bounds = interval(difference, resampled[1] - resampled[0])
        rows.append(
            {
                "encoder": a.info["encoder"],
                "image_attention": "bidirectional - causal",
                "column": title,
                "value": difference,
                "low": bounds[0],
                "high": bounds[1],
                "paper": paper,
                "p": swap_test(*terms, seed=SEED),
            }
        )
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows
