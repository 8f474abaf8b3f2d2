"""What a report and a study print: the table of sites, the verdicts, and what a reader must know of them."""

from collections.abc import Mapping, Sequence

from probes.runs.formatting import Entry, Rows, align
from probes.runs.steps import FAILED, LEFT_OUT, describe_steps

from .claim_table import (
    COLUMN_TITLES,
    claim_notes,
    claim_text,
    tested_columns,
    verdict_reasons,
)
from .headline import describe_study, describe_table
from .model_tables import (
    Comparison,
    describe_comparison,
    group_comparisons,
    pair_table,
    table_of_all,
)
from .site_table import shown_rows
from .strengths import edge_notes


def format_results(results: Entry) -> str:
    """Return the verdicts of results.json as text."""
    unfinished = results.get("unfinished", ())
    lines = describe_steps(unfinished, FAILED)
    lines += [""] * bool(lines)
    for joint in results.get("joint", []):
        lines += [
            f"{joint['model']}, {joint['dataset']}, seeds {', '.join(map(str, joint['seeds']))} jointly"
        ]
        lines += [_format_claims(joint["claims"], joint["has_llm"]), ""]
    for study in results.get("studies", [results]):
        lines += [f"{study['model']}, {study['dataset']}"] if "studies" in results else []
        notes = [*study.get("data_notes", ())]
        notes += edge_notes(study["path_at_edge"])
        with_llm = study["has_llm"]
        lines += [*_format_sites(study["sites"]), "", *describe_study(study)]
        lines += [*describe_table(study), ""]
        lines += [_format_claims(study["claims"], with_llm), *notes, ""]
    for group in group_comparisons(results.get("compared", [])):
        lines += _format_comparison(group)
    lines += describe_steps(unfinished, LEFT_OUT)
    return "\n".join(lines)


def _format_comparison(group: Comparison) -> list[str]:
    """Return the comparison of models as lines for the terminal: one table, then sentences about each pair."""
    rows = table_of_all(group) or [row for entry in group.pairs for row in pair_table(entry)]
    sentences = [line for entry in group.pairs for line in [*describe_comparison(entry), ""]]
    return [
        group.title,
        *_format_cells(rows),
        "",
        *sentences,
    ]


def _format_cells(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return rows of text as lines whose columns are aligned, after a line of their titles; [] without rows."""
    return align([list(rows[0]), *(list(row.values()) for row in rows)]) if rows else []


def _format_sites(sites: Rows) -> list[str]:
    """Return the table of sites as lines for the terminal; the mask is named if there are several."""
    shown = shown_rows(sites)
    with_random = any(row["random"] for row in shown)
    keys = ["site", "score", "interval"]
    if len({row["mask"] for row in shown}) > 1:
        keys = ["mask", *keys]
    titles = {
        "mask": "attention",
        "score": "mIoU",
        "interval": "95% interval",
    }
    if with_random:
        keys += ["random", "difference"]
    keys.append("best")
    rows = [[titles.get(key, key) if key != "best" else "" for key in keys]]
    rows += [[row[key] for key in keys] for row in shown]
    return align(rows)


def _format_claims(claims: list[Entry], has_llm: bool) -> str:
    """Return the claims as a table for the terminal, with notes and reasons; the page has all columns."""
    if not claims:
        return "No claim can be judged from these sites."
    mask = ["attention"] if has_llm else []
    rows = [
        [
            "claim",
            *mask,
            COLUMN_TITLES["optimum"].lower(),
            "beyond random",
            "conclusion",
        ]
    ]
    for claim in claims:
        text = claim_text(claim)
        conclusion = text.finding
        if "seeds" in claim["n"]:
            conclusion += f" ({text.count})"
        if text.truth:
            conclusion += f" (truth: {text.truth})"
        effects = [text.columns[name].effect for name in ("optimum", "beyond_random")]
        rows.append(
            [
                claim["claim"],
                *[text.mask] * has_llm,
                *effects,
                conclusion,
            ]
        )
    reasons = verdict_reasons(claims, tested_columns(claims, has_llm))
    return "\n".join([*align(rows), *claim_notes(claims), *reasons])
