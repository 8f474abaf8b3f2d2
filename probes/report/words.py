"""Numbers, names and sentences of the report, the same on the page and in the terminal.

Scores are in per cent, differences in points with their sign; intervals have none before positive ends, which the value
has: +11.5 [9.4, 13.6]. Other tasks than segmentation have their own unit. :func:`shown` writes the numbers of a table;
page and terminal select from what it returns.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from probes.tasks import SEGMENTATION, TASKS

if TYPE_CHECKING:
    from pandas import DataFrame

PICTURES = ("picture", "scene", "drawn")  # words in names of data sets without photos
MINUS = "\u2212"
# of the paper's masks: their matrices as characters, and their lines; others have their names and are dotted
SIGNS = {"causal": "◣", "bidirectional": "■"}
LINES = {"causal": "dashed", "bidirectional": "line"}
TICKS = {"encoder": "enc", "adapter": "ad", "final_norm": "norm", "encoder_norm": "norm"}
PATCHES = ("layer_00", "encoder_00")


# ------------------------------------------------------------------------------------------------ numbers
SCORES = ("value", "random")  # of sites; of claims these are differences, as all other numbers are
INTERVALS = {  # the numbers of tables, with the columns of their intervals
    "value": ("low", "high"),
    "beyond_value": ("beyond_low", "beyond_high"),
    "difference": ("low", "high"),
    "minus_random": ("minus_low", "minus_high"),
    "random": (),
}


def shown(table: "DataFrame", margins: Mapping[str, float] | None = None) -> "DataFrame":
    """Return claims, sites or differences with their numbers as text: NAME_text and NAME_ci, "" without a number.

    Sites also have an arrow: ▲ if one reads better than random models, by the task's margin, in `margins`, at least and
    in an interval without 0; ▼ if it reads worse.
    """
    texts = {}
    tasks = table["task"]
    for name, ends in INTERVALS.items():
        if name not in table:
            continue
        has_sign = name not in SCORES or "claim" in table
        values = zip(table[name], tasks, strict=True)
        texts[f"{name}_text"] = [number(value, task, has_sign) for value, task in values]
        if ends:
            low, high = ends
            rows = zip(table[low], table[high], tasks, strict=True)
            texts[f"{name}_ci"] = [interval(*row) for row in rows]
    if "minus_random" in table:
        gain = table["minus_random"] * tasks.map(lambda task: TASKS[task].sign)
        is_clear = table["minus_low"] * table["minus_high"] > 0
        is_large = gain.abs() >= tasks.map(margins)
        arrows = gain.gt(0).map({True: "▲", False: "▼"})
        texts["arrow"] = arrows.where(is_clear & is_large, "")
    return table.assign(**texts)


def number(value: float | None, task: str = SEGMENTATION, has_sign: bool = False) -> str:
    """Return a fraction in per cent or points, 13.0, or a number in the unit of another task; "" without one."""
    if value is None or value != value:
        return ""
    sign = "+" * has_sign
    if task == SEGMENTATION:
        return _minus(f"{100 * value:{sign}.1f}")
    return _minus(f"{value:{sign}.3g}")


def interval(low: float | None, high: float | None, task: str = SEGMENTATION) -> str:
    """Return an interval, [−0.5, 24.0]; "" without one."""
    ends = number(low, task), number(high, task)
    if not all(ends):
        return ""
    return f"[{', '.join(ends)}]"


def points(size: float, task: str = SEGMENTATION) -> str:
    """Return the size of a difference in a sentence: one point, 2.5 points, or a number in the unit of another task."""
    text = number(size, task)
    if task != SEGMENTATION:
        return text
    if text == "1.0":
        return "one point"
    return f"{text.removesuffix('.0')} points"


def axis_number(value: float, signed: bool) -> str:
    """Return a round value at an axis; differences have a sign."""
    sign = "+" * signed
    return _minus(f"{value:{sign}g}")


def _minus(text: str) -> str:
    if float(text) == 0:
        return text.lstrip("+-")
    return text.replace("-", MINUS)


def p_value(value: float) -> str:
    """Return a p-value: 0.012, or < 0.001."""
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}"


def noun_of(data: str) -> str:
    """Return what the images of a data set are called: photos, or pictures if they are drawn."""
    if any(word in data.lower() for word in PICTURES):
        return "picture"
    return "photo"


# ------------------------------------------------------------------------------------------------ sites
def site_number(site: str) -> int | None:
    """Return the number of a layer, None of another site."""
    number = site.rpartition("_")[2]
    if number.isdecimal():
        return int(number)
    return None


def site_name(site: str) -> str:
    """Return the name of a site in a sentence: layer 4, encoder layer 8, adapter."""
    number = site_number(site)
    if site in PATCHES:
        return "patch embeddings"
    if number is None:
        return site.replace("_", " ")
    kind = site.rpartition("_")[0]
    if kind == "encoder":
        kind = "encoder layer"
    return f"{kind} {number}"


def site_tick(site: str) -> str:
    """Return what stands at the axis of a small chart for a site, below which its zone is named."""
    number = site_number(site)
    if number is None:
        return TICKS.get(site, site)
    return str(number)


def the_site(site: str) -> str:
    """Return the name of a site after "at" in a sentence: the adapter, layer 4."""
    has_number = site_number(site) is not None and site not in PATCHES
    return "the " * (not has_number) + site_name(site)


def its_site(site: str) -> str:
    """Return the name of a site in a sentence about the model: its adapter, layer 4."""
    return the_site(site).replace("the ", "its ")


def zone_of(site: str, has_llm: bool) -> str:
    """Return the part of the model that a site is in."""
    if site == "adapter":
        return "adapter"
    if site.startswith("encoder"):
        return "encoder"
    if has_llm:
        return "LLM layers"
    return "encoder layers"


def lower_first(text: str) -> str:
    """Return a title within a sentence."""
    if text[:2].isupper():
        return text
    return text[:1].lower() + text[1:]


def key_parts(text: str) -> list[str]:
    """Return a sentence in pieces, what stands for models and readings ("{A:causal}") by itself, without braces."""
    return re.split(r"{([^{}]+)}", text)
