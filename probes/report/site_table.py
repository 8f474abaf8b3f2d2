"""The first table of a study: where the model can segment, and what random models reach at the same sites.

The adapter is compared with random adapters, the layers of the LLM with random and permuted LLMs, those of a bare
encoder with random and permuted encoders. A part of a random model that is not random equals the trained one's, and has
no row to compare with.

Shapes: S sites, R resamplings.
"""

from collections.abc import Iterable, Sequence

from probes.models.sites import (
    ADAPTER,
    FINAL_NORM,
    PATCHES,
    is_layer,
    layer_around,
    layer_number,
    part_of,
)
from probes.runs.formatting import (
    Entry,
    Rows,
    bounds,
    format_interval,
    format_percent,
    format_points,
    format_score,
)
from probes.runs.probe_run import ProbeRun
from probes.runs.study import CONTROLS, StudyRuns, runs_to_compare
from probes.score.estimate import Estimate

from .verdicts import MARGIN, compare_to_draws, interval_over_draws

WORSE = "worse than random models"
BETTER = "better than random models"
PART_NAMES = {
    "value": "values",
    "attn": "attention output",
    "mlp": "MLP output",
}


def site_rows(study: StudyRuns) -> Rows:
    """Return a row for each mask and site, of solved probes where all masks have them.

    "difference" is the score minus the mean of the random models', paired over images; its interval covers images and
    draws and needs two draws. Of random and permuted models it is the smaller difference, and the interval covers those
    of both. Scores and differences are fractions 0..1, None where nothing is random.
    """
    (runs,) = runs_to_compare(study)
    return [
        row for mask, run in runs.items() for row in _rows_of_run(study, mask, run, run.is_solved)
    ]


def _rows_of_run(
    study: StudyRuns,
    mask: str,
    run: ProbeRun,
    solved: bool,
) -> Rows:
    """Return the rows of one mask."""
    own = run.site_scores()
    scores = {
        control: [of_draw.site_scores() for of_draw in _random_runs(study, control, mask, solved)]
        for control in {*CONTROLS["llm"], *CONTROLS["adapter"]}
    }
    rows = []
    for entry in run.metrics["sites"]:
        site = entry["site"]
        controls = CONTROLS.get(_random_part(site), ())
        others = [[of[site] for of in scores[control] if site in of] for control in controls]
        row = {
            "image_attention": mask,
            "site": site,
            "miou": entry["miou"],
        }
        row |= bounds(entry["miou_ci95"])
        rows.append(row | _compare(own[site], others))
    return rows


def _random_runs(
    study: StudyRuns,
    control: str,
    mask: str,
    solved: bool,
) -> list[ProbeRun]:
    """Return the draws of a control; those of an adapter serve all masks, which it does not depend on."""
    draws = study.draws(control, solved=solved)
    if control != "adapter":
        return [draw[mask] for draw in draws if mask in draw]
    return [draw.get(mask) or next(iter(draw.values())) for draw in draws]


def _random_part(site: str) -> str | None:
    """Return what must be random for a site to have other states than the trained model's."""
    around = layer_around(site)
    if around == FINAL_NORM or (is_layer(around) and around != PATCHES):
        return "llm"
    return "adapter" if site == ADAPTER else None


def _compare(own: Estimate, others: Sequence[Sequence[Estimate]]) -> Entry:
    """Return the columns of the random models, from the draws of each control."""
    row = {
        "random": None,
        "draws": sum(map(len, others)),
        "difference": None,
    }
    row |= bounds(None, "difference_")
    compared = [compare_to_draws(own, draws) for draws in others if draws]
    if not compared:
        return row
    nearest = min(compared, key=lambda x: abs(x.value))
    row["random"] = nearest.about["trained"] - nearest.value
    row["difference"] = nearest.value
    if all(len(x.about["by_draw"]) > 1 for x in compared):
        # beyond all controls if the interval that covers theirs excludes zero
        lows, highs = zip(*(interval_over_draws(x)[0] for x in compared), strict=True)
        row |= bounds([min(lows), max(highs)], "difference_")
    return row


def describe_sites(rows: Rows, name_best: bool = True) -> list[str]:
    """Return sentences for each mask: where it reads best, and which sites differ from random models.

    Args:
        rows: The table.
        name_best: Say where it reads best.
    """
    sentences = []
    masks = list(dict.fromkeys(row["image_attention"] for row in rows))
    for mask in masks:
        of_mask = [row for row in rows if row["image_attention"] == mask]
        best = max(of_mask, key=lambda row: row["miou"])
        under = f" under {mask} attention" if len(masks) > 1 else ""
        score = format_score(best["miou"], [best["low"], best["high"]])
        if name_best:
            sentences.append(f"Best at {name_site(best['site'])}{under}: {score} mIoU.")
        sentences += _describe_differences(of_mask, under)
    return sentences


def _describe_differences(rows: Rows, under: str) -> list[str]:
    """Return which sites read better and worse than random models, beyond the margin; [] without two draws."""
    tested = [row for row in rows if row["difference_low"] is not None]
    if not tested:
        return []
    found = []
    for relation, sites in (
        (WORSE, [row["site"] for row in tested if _is_beyond(row, -1)]),
        (BETTER, [row["site"] for row in tested if _is_beyond(row, +1)]),
    ):
        if sites:
            verb = "read" if len(sites) > 1 else "reads"
            alone = "each by itself" if len(sites) > 1 else "by itself"
            names = name_sites(sites)
            found.append(f"{names[0].upper()}{names[1:]} {verb} {relation}{under}, {alone}.")
    if not found:
        return [f"No site reads better or worse than random models{under}."]
    return found


def _is_beyond(row: Entry, sign: int) -> bool:
    """Whether a difference of this sign counts: as large as the margin, and with zero outside of its interval."""
    nearest = row["difference_low"] if sign > 0 else row["difference_high"]
    return sign * nearest > 0 and abs(row["difference"]) >= MARGIN


def name_site(site: str) -> str:
    """Return the name of a site in a sentence: "layer 7", "the adapter", "the final norm", "the values of layer 7"."""
    if part := part_of(site):
        return f"the {PART_NAMES[part]} of layer {layer_number(site)}"
    if site == PATCHES:
        return "the patch embeddings"
    kind, _, number = site.rpartition("_")
    if number.isdecimal():
        name = {"layer": "layer", "encoder": "the encoder's layer"}[kind]
        return f"{name} {int(number)}"
    return f"the {site.replace('_', ' ')}"


def name_sites(sites: Iterable[str]) -> str:
    """Return the names of sites in a sentence: "the adapter, layers 1 to 4 and 9 and the final norm"."""
    sites = list(sites)
    layers = [site for site in sites if is_layer(site) and site != PATCHES]
    numbers = [layer_number(site) for site in layers]
    names = []
    for site in sites:
        if site not in layers:
            names.append(name_site(site))
        elif site == layers[0]:
            spans = join_words(_spans(numbers))
            names.append(f"layers {spans}" if len(numbers) > 1 else f"layer {spans}")
    return join_words(names)


def _spans(numbers: list[int]) -> list[str]:
    """Return sorted numbers as text, three or more in a row as "1 to 3"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    texts = []
    for span in spans:
        texts += [f"{span[0]} to {span[-1]}"] if len(span) > 2 else map(str, span)
    return texts


def join_words(words: Sequence[str]) -> str:
    """Return words as "a", "a and b" or "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def shown_rows(rows: Rows) -> list[dict[str, str]]:
    """Return the rows as text in percent and percentage points; "best" marks the best row of each mask."""
    best = {}
    for row in rows:
        mask = row["image_attention"]
        best[mask] = max(best.get(mask, 0.0), row["miou"])
    return [
        {
            "mask": row["image_attention"],
            "site": row["site"].replace("_", " "),
            "score": format_percent(row["miou"]),
            "interval": f"[{format_percent(row['low'])}, {format_percent(row['high'])}]",
            "random": format_percent(row["random"]) if row["draws"] else "",
            "difference": _format_difference(row),
            "best": "best" if row["miou"] == best[row["image_attention"]] else "",
        }
        for row in rows
    ]


def _format_difference(row: Entry) -> str:
    """Return a difference with its interval, "" without random models."""
    if not row["draws"]:
        return ""
    text = format_points(row["difference"])
    if row["difference_low"] is None:
        return f"{text} (one draw)"
    return f"{text} {format_interval([row['difference_low'], row['difference_high']])}"
