"""Format the main numbers of a study as LaTeX tables, in percent with 95% intervals."""

from collections.abc import Sequence

from probes.runs.formatting import Entry, format_score
from probes.runs.study import StudyRuns

from .claim_table import claim_text, tested_columns

Cells = list[dict[str, str]]  # rows of a table by its titles
SPECIAL = {character: "\\" + character for character in "_%&#${}"}
SPECIAL |= {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
# at the start of a row they would be options of the previous one
SPECIAL |= {"[": "{[}", "*": "{*}"}
ESCAPES = str.maketrans(
    SPECIAL
    | {
        "−": "$-$",
        "–": "--",
        "\n": " ",
    }
)


def format_tables(study: StudyRuns, claims: list[Entry]) -> str:
    """Return one booktabs table each of the scores per site and of the claims, if there are any.

    Args:
        study: The runs.
        claims: From :func:`evaluate_claims`.
    """
    has_llm = study.first.has_llm
    tables = {  # with the number of columns that hold names
        "mIoU (%) per site": (_scores(study), 1),
        "claims: differences in percentage points": (_claims(claims, has_llm), 1 + has_llm),
    }
    texts = [
        f"% {title}, with 95% intervals\n{latex_table([list(cells[0]), *map(_values, cells)], names)}"
        for title, (cells, names) in tables.items()
        if cells
    ]
    return "\n".join([r"% needs \usepackage{booktabs}", *texts])


def _values(row: dict[str, str]) -> list[str]:
    return list(row.values())


def _scores(study: StudyRuns) -> Cells:
    """Return a row for each site, and a column for each run."""
    runs = [*study.main_runs.values(), *study.untrained.values()]
    is_mixed = len({run.probe_kind for run in runs}) > 1
    rows: dict[str, dict[str, str]] = {site: {"site": site} for run in runs for site in run.sites}
    for run in runs:
        title = run.mask if run.has_llm else study.model
        title += ", untrained" * bool(run.metrics["untrained"])
        title += f", {run.probe_kind} probes" * is_mixed
        scores = {entry["site"]: entry for entry in run.metrics["sites"]}
        for site, row in rows.items():
            score = scores.get(site)
            row[title] = format_score(score["miou"], score["miou_ci95"]) if score else "–"
    return list(rows.values())


def _claims(claims: list[Entry], has_llm: bool) -> Cells:
    """Return a row for each claim, with its mask if the model has an LLM."""
    columns = tested_columns(claims, has_llm)
    known = any("truth" in claim for claim in claims)
    rows = []
    for text in map(claim_text, claims):
        row = {"claim": text.name}
        row |= {"image attention": text.mask} if has_llm else {}
        for name, title in columns.items():
            column = text.columns[name]
            row[title.lower()] = f"{column.effect} {column.verdict}".strip()
        if known:
            row["truth"] = text.truth
        rows.append(row | {"conclusion": text.finding})
    return rows


def latex_table(rows: Sequence[Sequence[str]], names: int) -> str:
    """Return a tabular for the booktabs package.

    Args:
        rows: Cells of plain text; the first row is the header.
        names: Number of columns that hold names, which are aligned on the left; numbers are aligned on the right.
    """
    header, *body = (" & ".join(cell.translate(ESCAPES) for cell in row) + r" \\" for row in rows)
    head = rf"\begin{{tabular}}{{{'l' * names}{'r' * (len(rows[0]) - names)}}}"
    return "\n".join(
        [head, r"\toprule", header, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    )
