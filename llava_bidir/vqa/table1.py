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
        of_encoder = PAPER_SCORES.get(self.info["encoder"], {})
        score = of_encoder.get(self.info["image_attention"], {}).get(title, math.nan)
        if SCORED[title].categories:
            return score
        return score / 100


class TableRow(NamedTuple):
    """A row of table1.csv: a score of a model, or a difference of two, and what belongs to it; NaN for what does not.

    Args:
        encoder: Of the model.
        image_attention: Its mask, or "bidirectional - causal".
        column: Title of the score.
        value: Score or difference.
        low: Of its 95% interval.
        high: Of its 95% interval.
        paper: The paper's.
        p: p-value of a difference.
        p_holm: It, adjusted for the number of columns.
    """

    encoder: str
    image_attention: str
    column: str
    value: float
    low: float
    high: float
    paper: float
    p: float = math.nan
    p_holm: float = math.nan


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
    table = pd.DataFrame(rows, columns=TableRow._fields)
    rounded = format_tables(options.out / "table1", rows=rounded_rows(models, scores), note=NOTE)
    described = {"models": [model.info for model in models], "rows": table.to_dict("records")}
    csv = options.out / "table1.csv"
    write_files({csv: table.to_csv(index=False), **rounded, csv.with_suffix(".json"): described})
    print(table.to_string(index=False, float_format="{:.3f}".format, na_rep="–"))


def read_results(folder: Path) -> Results:
    """Return the results of the finished tasks in a folder."""
    results = Results({}, {})
    for name, benchmark in BENCHMARKS.items():
        file = folder / f"{name}.json"
        if file.exists():
            task = read_json(file)
            items = task.pop("items")
            results.items.update(dict.fromkeys(benchmark.columns, items))
            results.info.update(task, results=str(folder))
    if not results.items:
        raise UserError(f"{folder} has no results of `llava-bidir vqa`")
    return results


def score_rows(results: Results) -> list[TableRow]:
    """Return a row of the table for each score of a model, with its 95% interval and the paper's."""
    rows = []
    for title in results.items:
        terms = results.terms(title)
        highest = 1.0
        if SCORED[title].categories:
            highest = math.inf
        value = terms.score()
        low, high = interval(value, terms.resampled_scores(), lowest=0.0, highest=highest)
        row = TableRow(
            encoder=results.info["encoder"],
            image_attention=results.info["image_attention"],
            column=title,
            value=value,
            low=low,
            high=high,
            paper=results.paper_score(title),
        )
        rows.append(row)
    return rows


def pair_rows(a: Results, b: Results) -> list[TableRow]:
    """Compare bidirectional (b) with causal (a) on the same questions; p-values are adjusted for the columns."""
    rows = []
    for title in filter(b.items.__contains__, a.items):
        if not are_asked_alike(a, b, title):
            folders = f"{a.info['results']} and {b.info['results']}"
            raise UserError(f"{title}: {folders} differ in more than the mask: questions or dtype")
        value, low, high = paired_difference(a, b, title)
        row = TableRow(
            encoder=a.info["encoder"],
            image_attention="bidirectional - causal",
            column=title,
            value=value,
            low=low,
            high=high,
            paper=b.paper_score(title) - a.paper_score(title),
            p=swap_test(a.terms(title), b.terms(title)),
        )
        rows.append(row)
    adjusted = holm([row.p for row in rows])
    return [row._replace(p_holm=p) for row, p in zip(rows, adjusted, strict=True)]


def paired_difference(a: Results, b: Results, title: str) -> tuple[float, float, float]:
    """Return how much higher b's score is, and the ends of the 95% interval, on the same questions."""
    terms_a = a.terms(title)
    terms_b = b.terms(title)
    value = terms_b.score() - terms_a.score()
    low, high = interval(value, terms_b.resampled_scores() - terms_a.resampled_scores())
    return value, low, high


def are_asked_alike(a: Results, b: Results, title: str) -> bool:
    """Return whether two models of one dtype have answered the same questions."""
    asked = [[[item[key] for key in ASKED] for item in model.items[title]] for model in (a, b)]
    return asked[0] == asked[1] and a.info["dtype"] == b.info["dtype"]


def rounded_rows(models: list[Results], scores: list[list[TableRow]]) -> list[Row]:
    """Return a row for people for each model, with its scores by column, and one below it with the paper's."""
    rows: list[Row] = []
    for model, of_model in zip(models, scores, strict=True):
        about = {"model": model.info["encoder"], "mask": model.info["image_attention"]}
        ours: dict[str, str | Score] = {**about, "source": model.info["results"]}
        published: dict[str, str | Score] = {}
        for row in of_model:
            title = row.column
            value, low, high, paper = (
                _rounded(title, x) for x in (row.value, row.low, row.high, row.paper)
            )
            is_best = is_shown_best(model, models, title)
            ours[title] = Score(value, f"[{low}, {high}]", is_best)
            if not math.isnan(row.paper):
                published[title] = Score(paper)
        rows.append(ours)
        if published:
            rows.append({**about, "source": "paper", **published})
    return rows


def _rounded(title: str, value: float) -> str:
    if SCORED[title].categories:
        return f"{value:.0f}"
    return f"{100 * value:.1f}"


def is_shown_best(model: Results, models: list[Results], title: str) -> bool:
    """Return whether a model's score is higher than each other's, by paired intervals on the same questions."""
    rivals = [other for other in models if other is not model and title in other.items]
    for other in rivals:
        if not are_asked_alike(other, model, title):
            return False
        _, low, _ = paired_difference(other, model, title)
        if low <= 0:
            return False
    return bool(rivals)
