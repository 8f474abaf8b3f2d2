"""Format the main numbers of a study as LaTeX tables, in percent with 95% intervals."""

from typing import Any

from llava_bidir.common.latex import latex_table
from probes.results.formatting import Rows, format_difference, format_p, format_score
from probes.results.study import StudyRuns

from .claim_table import COLUMN_TITLES, claim_text


def format_tables(study: StudyRuns, claims: list[dict[str, Any]], knockout: Rows) -> str:
    """Return one booktabs table each of the scores per site, the claims and the knockout; empty ones are left out.

    Args:
        study: The runs.
        claims: From :func:`evaluate_claims`.
        knockout: The effects of all runs, from :func:`effect_rows`.
    """
    tables = {"mIoU (%) per site": (_score_rows(study), 1)}
    if claims:
        tables["claims: differences in percentage points"] = (_claim_rows(claims), 2)
    if knockout:
        title = "knockout: change of the wrong patches left in the later half of the layers, in percentage points"
        tables[title] = (_knockout_rows(knockout), 4)
    texts = [
        f"% {title}, with 95% intervals\n{latex_table(rows, names)}"
        for title, (rows, names) in tables.items()
    ]
    return "\n".join([r"% needs \usepackage{booktabs}", *texts])


def _score_rows(study: StudyRuns) -> list[list[str]]:
    """Return a row for each site, and a column for each run."""
    runs = [*study.main_runs.values(), *study.untrained.values()]
    is_mixed = len({run.probe_kind for run in runs}) > 1
    titles = []
    columns = []
    for run in runs:
        words = [run.mask]
        if run.metrics["untrained"]:
            words.append("untrained")
        if is_mixed:
            words.append(f"{run.probe_kind} probes")
        titles.append(", ".join(words))
        scores = {}
        for entry in run.metrics["sites"]:
            scores[entry["site"]] = format_score(entry["miou"], entry["miou_ci95"])
        columns.append(scores)
    sites = dict.fromkeys(site for column in columns for site in column)
    rows = [["site", *titles]]
    for site in sites:
        rows.append([site, *(column.get(site, "–") for column in columns)])
    return rows


def _claim_rows(claims: list[dict[str, Any]]) -> list[list[str]]:
    known = ["truth"] if any("truth" in claim for claim in claims) else []
    rows = [
        [
            "claim",
            "image attention",
            *(title.lower() for title in COLUMN_TITLES.values()),
            *known,
            "conclusion",
        ]
    ]
    for text in map(claim_text, claims):
        columns = [f"{column.effect} {column.verdict}".strip() for column in text.columns.values()]
        truth = [text.truth] if known else []
        rows.append([text.name, text.mask, *columns, *truth, text.finding])
    return rows


def _knockout_rows(effects: Rows) -> list[list[str]]:
    rows = [["image attention", "class", "blocked", "control", "change", "p", "p (Holm)"]]
    for row in effects:
        change = row | {"ci95": [row["low"], row["high"]]}
        rows.append(
            [
                row["image_attention"],
                row["class"],
                row["condition"],
                row["control"].replace("_", " "),
                format_difference(change),
                format_p(row["p"]),
                format_p(row["p_holm"]),
            ]
        )
    return rows
