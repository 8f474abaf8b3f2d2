"""The table of claims: of each a row of numbers, for CSV files and notebooks, and its text, for all that is read.

Page, terminal, LaTeX and demo select from the text of a claim; none of them formats a number or a verdict.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from probes.runs.formatting import Entry, Rows, format_difference, format_p, value_columns
from probes.score.estimate import estimate_text
from probes.tasks import SEGMENTATION

from .verdicts import ALPHA, FAILS, HOLDS, MARGIN, REVERSED, SUPPORTED, UNTESTED, measured_effect

COLUMN_TITLES = {
    "paper": "As the paper measures it",
    "optimum": "At the optimum",
    "beyond_random": "Beyond random",
}
MARKS = {
    HOLDS: "✓",
    FAILS: "✗",
    REVERSED: "✗",
    UNTESTED: "–",
}
# a bootstrap interval of the mean of 10 normal numbers has the true one in 90% of cases, of 2 in 50%
FEW_IMAGES = 10


# The columns of :func:`claim_row` that a notebook shows; the others are where these come from.
HEADLINES = (
    *("model", "dataset", "task", "seed", "mask", "claim"),
    *("conclusion", "finding", "supported", "truth"),
    *("value", "low", "high", "beyond_value", "beyond_low", "beyond_high"),
    *COLUMN_TITLES,
)


def claim_row(study: Entry, claim: Entry) -> Entry:
    """Return a claim as a row of numbers; "value", "low" and "high" are those that the conclusion is about.

    Args:
        study: The entry of results.json that has the claim: a study, or one of "tasks".
        claim: From :func:`evaluate_claims`.
    """
    verdicts = claim["verdicts"]
    row = {
        "model": study["model"],
        "dataset": study["dataset"],
        "task": study.get("task", SEGMENTATION),
        "seed": study["seed"],
        "mask": claim["image_attention"],
    }
    row |= {key: claim.get(key) for key in ("claim", "conclusion", "finding", "supported", "truth")}
    row |= value_columns(measured_effect(claim))
    row |= value_columns(verdicts["beyond_random"], "beyond_")
    row |= {name: verdicts[name]["verdict"] for name in COLUMN_TITLES}
    row |= value_columns(verdicts["paper"], "paper_")
    row |= value_columns(verdicts["paper"].get("below_optimum"), "below_optimum_")
    row |= value_columns(verdicts["optimum"], "optimum_")
    row |= value_columns(claim["control"], "untrained_")
    for name, column in verdicts.items():
        row |= {f"{name}_{key}": column.get(key) for key in ("detectable", "reason")}
    row |= {"images": claim["n"]["images"], "patches": claim["n"].get("patches")}
    return row | {"p": claim["p"], "p_holm": claim["p_holm"]}


def claim_rows(studies: Iterable[Entry]) -> Rows:
    """Return :func:`claim_row` of all claims of studies, or of entries of "tasks"."""
    return [claim_row(study, claim) for study in studies for claim in study["claims"]]


@dataclass(frozen=True)
class ColumnText:
    """A column of a claim as text."""

    verdict: str
    mark: str  # of the verdict
    effect: str  # value and interval, "" without
    note: str  # the distance from the optimum, or the smallest effect that it would find
    reason: str  # why it is untested, "" if it is not


@dataclass(frozen=True)
class ClaimText:
    """A claim as text: differences in percentage points, or in the unit of another task's score."""

    name: str  # with blanks
    mask: str
    statement: str
    source: str  # place in the paper, or what is subtracted from what
    truth: str  # of a world in which it is known, else ""
    finding: str
    tested: bool  # False if the conclusion is "untested"
    count: str  # of the seeds or images that it is a mean over
    p: str  # corrected for the number of claims, "" without
    effects: list[
        str
    ]  # that the conclusion is about: also beyond random where it holds at the optimum
    columns: dict[str, ColumnText]


def claim_text(claim: Entry, task: str = SEGMENTATION) -> ClaimText:
    """Return the text of a claim about a task."""
    verdicts = claim["verdicts"]
    statement, _, source = claim["text"].partition(": ")
    effects = [format_effect(measured_effect(claim), task)]
    if verdicts["optimum"]["verdict"] == HOLDS and verdicts["beyond_random"]["ci95"]:
        effects.append(format_effect(verdicts["beyond_random"], task))
    return ClaimText(
        claim["claim"].replace("_", " "),
        claim["image_attention"],
        statement,
        source,
        claim.get("truth", ""),
        claim["finding"],
        claim["conclusion"] != UNTESTED,
        format_count(claim["n"]),
        "" if claim["p_holm"] is None else format_p(claim["p_holm"]),
        effects,
        {name: _column_text(verdicts[name], task) for name in COLUMN_TITLES},
    )


def _column_text(column: Entry, task: str) -> ColumnText:
    verdict = column["verdict"]
    notes = []
    if "row" in column and column["converged"] < column["strengths"]:
        notes.append(f"converged at {column['converged']} of {column['strengths']} strengths")
    if column.get("below_optimum"):
        notes.append(f"below the optimum by {format_effect(column['below_optimum'], task)}")
    if len(column.get("controls", ())) > 1:
        notes.append(f"beyond {column['control']} layers")
    if "detectable" in column:
        notes.append(f"detectable: {100 * column['detectable']:.1f}")
    return ColumnText(
        verdict,
        MARKS[verdict],
        format_effect(column, task),
        "; ".join(notes),
        column.get("reason", ""),
    )


def format_effect(entry: Entry, task: str = SEGMENTATION) -> str:
    """Return the value and interval of an entry: in points, or in the unit of another task's score; "" without."""
    if entry["value"] is None or entry["ci95"] is None:
        return ""
    return format_difference(entry) if task == SEGMENTATION else estimate_text(entry)


def format_count(n: Mapping[str, int]) -> str:
    """Return the number of seeds or images that a claim is a mean over."""
    if "seeds" not in n:
        return f"{n['images']} images"
    fewer = n["seeds"] < n.get("of", n["seeds"])
    return f"{n['seeds']} of {n['of']} seeds" if fewer else f"{n['seeds']} seeds"


def tested_by_mask(claims: Iterable[Entry]) -> list[dict[str, ClaimText]]:
    """Return the texts of each claim by mask, of those that are tested under some mask."""
    grouped: dict[str, dict[str, ClaimText]] = {}
    for text in map(claim_text, claims):
        grouped.setdefault(text.name, {})[text.mask] = text
    return [by_mask for by_mask in grouped.values() if any(x.tested for x in by_mask.values())]


def tested_columns(claims: Iterable[Entry], has_llm: bool) -> dict[str, str]:
    """Return the titles of the columns that are shown: the paper's, which has no encoders, only of trained probes."""
    of_paper = [claim["verdicts"]["paper"]["verdict"] for claim in claims]
    if has_llm or any(verdict != UNTESTED for verdict in of_paper):
        return COLUMN_TITLES
    return {name: title for name, title in COLUMN_TITLES.items() if name != "paper"}


def known_truths(studies: Iterable[Entry]) -> list[tuple[Entry, ClaimText]]:
    """Return the claims of studies whose truth is known, each with its study."""
    return [
        (study, claim_text(claim))
        for study in studies
        for claim in study["claims"]
        if "truth" in claim
    ]


# ------------------------------------------------------------------------------------------------ sentences
def summarize_claims(claims: list[Entry]) -> str:
    """Return how many claims are supported, and which; the numbers of other conclusions, and of untested claims."""
    tested = [claim for claim in claims if claim["supported"] is not None]
    supported = [claim for claim in tested if claim["finding"] == SUPPORTED]
    several = len({claim["image_attention"] for claim in claims}) > 1
    names = ", ".join(
        claim["claim"].replace("_", " ") + f" {claim['image_attention']}" * several
        for claim in supported
    )
    parts = [f"{len(supported)} supported" + (f" ({names})" if names else "")]
    others = Counter(claim["finding"] for claim in tested if claim["finding"] != SUPPORTED)
    for finding, count in others.most_common():
        parts.append(f"{count} {finding if count == 1 else finding.replace('does not', 'do not')}")
    if len(claims) > len(tested):
        parts.append(f"{len(claims) - len(tested)} untested")
    counted = "1 claim" if len(claims) == 1 else f"{len(claims)} claims"
    return f"Of {counted}: {', '.join(parts)}."


def is_right(text: ClaimText) -> bool:
    """Return whether the verdict on a claim whose truth is known is right: a planted effect is supported, no other."""
    return (text.finding == SUPPORTED) == (text.truth == "planted")


def summarize_truths(studies: Iterable[Entry]) -> str:
    """Return a sentence: about how many claims whose truth is known the verdicts are right; "" if none is known."""
    known = known_truths(studies)
    if not known:
        return ""
    judged = [(study, text) for study, text in known if text.tested]
    parts = []
    for truth, about, mistaken in (
        ("planted", "planted effects", "missed"),
        ("absent", "absent ones", "wrongly"),
    ):
        of_truth = [(study, text) for study, text in judged if text.truth == truth]
        supported = sum(text.finding == SUPPORTED for _, text in of_truth)
        wrong = [_name_claim(study, text) for study, text in of_truth if not is_right(text)]
        named = f" ({mistaken}: {'; '.join(wrong)})" if wrong else ""
        if of_truth:
            parts.append(f"{supported} of {len(of_truth)} {about}{named}")
    right = sum(is_right(text) for _, text in judged)
    said = f"The verdicts are right about {right} of {len(judged)} claims whose truth is known"
    if parts:
        said += f": supported are {' and '.join(parts)}"
    untested = len(known) - len(judged)
    return f"{said}; {untested} untested." if untested else f"{said}."


def _name_claim(study: Entry, text: ClaimText) -> str:
    """Return the name of a claim among those of several models and masks."""
    under = f" under {text.mask} attention" * (len(study["masks"]) > 1)
    return f"{text.name}{under}, of the model {study['model']!r}"


def claim_notes(claims: list[Entry], margin: str = f"{100 * MARGIN:g} point") -> list[str]:
    """Return what a reader of the claims must know: the margin, their number, and verdicts that are not independent."""
    tested = [claim["p_holm"] for claim in claims if claim["p_holm"] is not None]
    beyond = [claim["verdicts"]["beyond_random"] for claim in claims]
    beyond = [column for column in beyond if column["verdict"] != UNTESTED]
    notes = [f"At the optimum and beyond random, an effect counts from {margin}."]
    if any(len(column.get("controls", ())) > 1 for column in beyond):
        notes.append(
            "Beyond random: beyond layers of random weights that change the states as much, and beyond the trained "
            "weights in random order. The number is of those beyond which a claim fares worst."
        )
    counts = [claim["n"] for claim in claims]
    for unit, unit_text in (("images", "validation images"), ("groups", "groups of images")):
        fewest = min((count[unit] for count in counts if unit in count), default=FEW_IMAGES)
        if fewest < FEW_IMAGES:
            notes.append(
                f"{fewest} {unit_text} tell next to nothing: such intervals are too short, and a verdict is no more "
                f"than a trial of the command. Add images; from {FEW_IMAGES} {unit} on, intervals mean something."
            )
    if len(tested) > 1:
        notes.append(
            f"{len(tested)} claims are tested. One is called supported if p, corrected for their number (Holm), is "
            f"below {ALPHA}, and supported by itself if only the uncorrected p is."
        )
    if any(claim["claim"] == "starvation_without_sink" for claim in claims):
        notes.append(
            "The first image token is an attention sink in the compared layer: its state is one large vector, whatever "
            "the image shows. Of starvation, the claim without this token is about context."
        )
    if any("same_as" in column for column in beyond):
        notes.append(
            "Recovery and recovery trained share the column beyond random: one confirmation, not two."
        )
    if any("same_draws_as" in column for column in beyond):
        notes.append(
            "Random adapters are the same under both masks: one confirmation of the adapter's drop, not two."
        )
    return notes


def verdict_reasons(
    claims: Iterable[Entry], columns: Iterable[str] = tuple(COLUMN_TITLES)
) -> list[str]:
    """Return why columns of claims are untested, and which seeds are left out of joint ones; each reason once."""
    reasons = []
    for claim in claims:
        verdicts = {name: claim["verdicts"][name] for name in columns}
        for name, column in verdicts.items():
            if "reason" in column:
                reasons.append(f"{COLUMN_TITLES[name]}: {column['verdict']}, {column['reason']}")
        for name, column in verdicts.items():
            seeds = {} if "reason" in column else column.get("left_out", {})
            for seed, reason in seeds.items():
                reasons.append(f"{COLUMN_TITLES[name]}: without seed {seed}, {reason}")
    return list(dict.fromkeys(reasons))
