"""Format the main numbers of a study as LaTeX tables, in percent with 95% intervals."""

from typing import Any

from llava_bidir.common.latex import latex_table
from probes.results.formatting import format_difference, format_score
from probes.results.study import StudyRuns

from .summary_text import COLUMN_TITLES


def format_tables(study: StudyRuns, claims: list[dict[str, Any]]) -> str:
    """Return one booktabs table each of the scores per site and of the claims, if there are any.

    Args:
        study: The runs.
        claims: From :func:`evaluate_claims`.
    """
    tables = {"mIoU (%) per site": (_score_rows(study), 1)}
    if claims:
        tables["claims: differences in percentage points"] = (_claim_rows(claims), 2)
    texts = [
        f"% {title}, with 95% intervals\n{latex_table(rows, names)}"
        for title, (rows, names) in tables.items()
    ]
    return "\n".join([r"% needs \usepackage{booktabs}", *texts])


def _score_rows(study: StudyRuns) -> list[list[str]]:
    """Return a row for each site, and a column for each run."""
    is_mixed = len({run.probe_kind for run in study.runs}) > 1
    titles = []
    columns = []
    for run in study.runs:
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
    for claim in claims:
        cells = [
            f"{format_difference(v)} {v['verdict']}".strip() for v in claim["verdicts"].values()
        ]
        cells += [claim.get(key, "") for key in known]
        rows.append(
            [
                claim["claim"].replace("_", " "),
                claim["image_attention"],
                *cells,
                claim["finding"],
            ]
        )
    return rows
