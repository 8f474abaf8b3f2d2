"""What a report and a study print: the table of sites, the verdicts, and what a reader must know of them."""

from probes.results.formatting import Entry, Rows, align
from probes.results.steps import FAILED, LEFT_OUT, describe_steps

from .beyond_classes import claim_texts, task_notes
from .claim_table import COLUMN_TITLES, claim_notes, claim_text, verdict_reasons
from .encoder_layers import describe_best_layer
from .model_comparison import describe_comparison, shown_comparison
from .site_table import describe_sites, shown_rows
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
        lines += [_format_claims(joint["claims"]), ""]
    for study in results.get("studies", [results]):
        lines += [f"{study['model']}, {study['dataset']}"] if "studies" in results else []
        notes = [*study.get("data_notes", ()), *edge_notes(study["path_at_edge"])]
        lines += [*_format_sites(study["sites"]), ""]
        lines += [_format_claims(study["claims"]), *notes, ""]
        if best := study.get("best_layer"):
            lines += [f"{study['model']}, {study['dataset']}: {describe_best_layer(best)}"]
    for entry in results.get("compared", []):
        lines += _format_comparison(entry)
    lines += _format_tasks(results.get("tasks", []), results.get("joint_tasks", []))
    lines += describe_steps(unfinished, LEFT_OUT)
    return "\n".join(lines)


def _format_comparison(entry: Entry) -> list[str]:
    """Return the comparison of two models as lines for the terminal."""
    rows = shown_comparison(entry)
    heading = (
        f"{entry['second']} minus {entry['first']}, {entry['dataset']}, {entry['image_attention']}"
    )
    cells = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    return [heading, *(align(cells) if cells else []), "", *describe_comparison(entry), ""]


def _format_sites(sites: Rows) -> list[str]:
    """Return the table of sites as lines for the terminal, with its two sentences."""
    shown = shown_rows(sites)
    with_random = any(row["random"] for row in shown)
    keys = ["mask", "site", "score", "interval"]
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
    return [*align(rows), "", *describe_sites(sites)]


def _format_claims(claims: list[Entry]) -> str:
    """Return the claims as a table for the terminal, with notes and reasons; the page has all columns."""
    rows = [["claim", "attention", COLUMN_TITLES["optimum"].lower(), "beyond random", "conclusion"]]
    for claim in claims:
        text = claim_text(claim)
        conclusion = text.finding
        if "seeds" in claim["n"]:
            conclusion += f" ({text.count})"
        if text.truth:
            conclusion += f" (truth: {text.truth})"
        effects = [text.columns[name].effect for name in ("optimum", "beyond_random")]
        rows.append([claim["claim"], text.mask, *effects, conclusion])
    return "\n".join([*align(rows), *claim_notes(claims), *verdict_reasons(claims)])


def _format_tasks(entries: list[Entry], joint: list[Entry]) -> list[str]:
    """Return the claims about other tasks as lines for the terminal."""
    lines = []
    for tasks in (entries, joint):
        lines += _format_task_claims(claim_texts(tasks))
    return [*lines, *task_notes(entries, joint)] if lines else []


def _format_task_claims(rows: list[dict[str, str]]) -> list[str]:
    """Return a table of claims; model, dataset and seed are left out where all rows have the same."""
    if not rows:
        return []
    named = [key for key in ("model", "dataset", "seed") if len({row.get(key) for row in rows}) > 1]
    named += ["seeds"] if "seeds" in rows[0] else []
    shown = ["task", *named, "attention", "claim", "effect", "beyond random", "finding"]
    return [*align([shown, *([row[key] for key in shown] for row in rows)]), ""]
