"""`llava-bidir vqa-table`: Table 1 beside the paper's, with intervals and paired tests; fractions, but MME's points."""

import json
import math
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from llava_bidir.command_options import VQATableOptions
from llava_bidir.common.bootstrap import holm, interval
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json, write_files
from llava_bidir.common.tables import Row, Score, format_tables

from .scores import BENCHMARKS, Item, ScoreTerms, swap_test

SCORED = {title: x for benchmark in BENCHMARKS.values() for title, x in benchmark.columns.items()}
ASKED = ("item", "unit", "question", "target")
NUMBER_COLUMNS = ["value", "low", "high", "paper", "p", "p_holm"]
NOTE = "In %, MME in points; 95% intervals. Bold: shown to be better than each other model, on the same questions."
PAPER_SCORES = json.loads(Path(__file__).with_name("paper.json").read_text())


class Results(NamedTuple):
    """Results of a checkpoint: its settings, and the answered items by column."""

    info: dict[str, str]
    items: dict[str, list[Item]]

    def terms(self, title: str) -> ScoreTerms:
        """Return the terms of a score."""
        return SCORED[title].terms(self.items[title])

    def paper_score(self, title: str) -> float:
        """Return the paper's score of this encoder and mask; NaN if it has none."""
        scores = PAPER_SCORES.get(self.info["encoder"], {}).get(self.info["image_attention"], {})
        return scores.get(title, math.nan) / (1 if SCORED[title].categories else 100)


def run(options: VQATableOptions) -> None:
    """Write OUT/table1.{csv,md,tex,json} from finished folders of `llava-bidir vqa`, and print the table.

    In Markdown and LaTeX, a row is a model. In CSV and JSON, it is a score of a model, or the difference of a
    bidirectional model from a causal one with the same encoder.

    Raises:
        UserError: A folder has no results, or two models were asked other questions.
    """
    models = [read_results(folder) for folder in options.results]
    scores = [score_rows(model) for model in models]
    rows = [row for of_model in scores for row in of_model]
    for a, b in product(models, repeat=2):
        masks = [model.info["image_attention"] for model in (a, b)]
        if a.info["encoder"] == b.info["encoder"] and masks == ["causal", "bidirectional"]:
            rows += pair_rows(a, b)
    table = pd.DataFrame(rows, columns=["encoder", "image_attention", "column", *NUMBER_COLUMNS])
    rounded = format_tables(options.out / "table1", rows=rounded_rows(models, scores), note=NOTE)
    described = {"models": [model.info for model in models], "rows": table.to_dict("records")}
    csv = options.out / "table1.csv"
    write_files({csv: table.to_csv(index=False), **rounded, csv.with_suffix(".json"): described})
    print(table.to_string(index=False, float_format="{:.3f}".format, na_rep="–"))


def read_results(folder: Path) -> Results:
    """Return the results of the finished tasks in a folder."""
    files = {name: folder / f"{name}.json" for name in BENCHMARKS}
    tasks = {name: read_json(file) for name, file in files.items() if file.exists()}
    if not tasks:
        raise UserError(f"{folder} has no results of `llava-bidir vqa`")
    info = {}
    items = {}
    for name, task in tasks.items():
        items |= dict.fromkeys(BENCHMARKS[name].columns, task.pop("items"))
        info |= task | {"results": str(folder)}
    return Results(info, items)


def score_rows(results: Results) -> list[list]:
    """Return a row of the table for each score of a model, with its 95% interval and the paper's."""
    names = [results.info[key] for key in ("encoder", "image_attention")]
    rows = []
    for title in results.items:
        terms = results.terms(title)
        value = terms.score()
        highest = math.inf if SCORED[title].categories else 1.0
        bounds = interval(value, terms.resampled_scores(), lowest=0.0, highest=highest)
        rows.append([*names, title, value, *bounds, results.paper_score(title), math.nan, math.nan])
    return rows


def pair_rows(a: Results, b: Results) -> list[list]:
    """Compare bidirectional (b) with causal (a) on the same questions; p-values are adjusted for the columns."""
    rows = []
    for title in filter(b.items.__contains__, a.items):
        if not are_asked_alike(a, b, title):
            folders = f"{a.info['results']} and {b.info['results']}"
            raise UserError(f"{title}: {folders} differ in more than the mask: questions or dtype")
        terms = (a.terms(title), b.terms(title))
        difference = terms[1].score() - terms[0].score()
        bounds = interval(difference, terms[1].resampled_scores() - terms[0].resampled_scores())
        paper = b.paper_score(title) - a.paper_score(title)
        names = (a.info["encoder"], "bidirectional - causal", title)
        rows.append([*names, difference, *bounds, paper, swap_test(*terms)])
    adjusted = holm([row[-1] for row in rows])
    return [[*row, p] for row, p in zip(rows, adjusted, strict=True)]


def rounded_rows(models: list[Results], scores: list[list[list]]) -> list[Row]:
    """Return a row for people for each model, with its scores by column, and one below it with the paper's."""
    rows: list[Row] = []
    for model, of_model in zip(models, scores, strict=True):
        about = {"model": model.info["encoder"], "mask": model.info["image_attention"]}
        ours: dict[str, str | Score] = {**about, "source": model.info["results"]}
        paper: dict[str, str | Score] = {**about, "source": "paper"}
        for _, _, title, value, low, high, published, *_ in of_model:
            ends = f"[{_rounded(title, low)}, {_rounded(title, high)}]"
            ours[title] = Score(_rounded(title, value), ends, is_shown_best(model, models, title))
            if not math.isnan(published):
                paper[title] = Score(_rounded(title, published))
        rows.append(ours)
        if len(paper) > len(about) + 1:
            rows.append(paper)
    return rows


def _rounded(title: str, value: float) -> str:
    return f"{value:.0f}" if SCORED[title].categories else f"{100 * value:.1f}"


def is_shown_best(model: Results, models: list[Results], title: str) -> bool:
    """Return whether a model's score is higher than each other's, by paired intervals on the same questions."""
    terms = model.terms(title)
    rivals = [other for other in models if other is not model and title in other.items]
    for other in rivals:
        theirs = other.terms(title)
        difference = terms.score() - theirs.score()
        if difference <= 0 or not are_asked_alike(model, other, title):
            return False
        if interval(difference, terms.resampled_scores() - theirs.resampled_scores())[0] <= 0:
            return False
    return bool(rivals)


def are_asked_alike(a: Results, b: Results, title: str) -> bool:
    """Return whether two models of one dtype have answered the same questions."""
    asked = [[[item[key] for key in ASKED] for item in model.items[title]] for model in (a, b)]
    return asked[0] == asked[1] and a.info["dtype"] == b.info["dtype"]
