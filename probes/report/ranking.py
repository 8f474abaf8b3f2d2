"""Which of several models or masks reads best: the lead beside each of the others, and what is said of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pandas import DataFrame

from .best_layers import BEST_LAYER, BETTER, WORSE
from .readings import ReportView, SiteReading
from .verdicts import NEGLIGIBLE, NO_EFFECT
from .words import interval, its_site, noun_of, number, points, site_number

ALIKE = (NO_EFFECT, NEGLIGIBLE)
SEEN_FROM_THE_OTHER = {BETTER: WORSE, WORSE: BETTER}
MOST_RIVALS = 4  # that the sentence names
READ_BY = {
    "squash": "squashed",
    "pad": "padded",
    "letterbox": "padded",
    "center_crop": "cropped",
    "slide": "in windows",
}
MOST_TIMES = 50  # so many times the photos are worth naming


@dataclass(frozen=True, eq=False)
class Rival:
    """A model or mask beside the lead.

    Args:
        reading: What it reads.
        finding: Whether the lead is better, or worse; None if the two were not compared.
        value: How much more the lead reads at its best layer, and the 95% interval.
        low: Of the interval.
        high: Of the interval.
        detectable: Smallest difference that 80% of such studies find.
    """

    reading: SiteReading
    finding: str | None = None
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    detectable: float = math.nan

    @property
    def is_shown(self) -> bool:
        """Whether one of the two is shown to be better."""
        return self.finding in (BETTER, WORSE)

    @property
    def text(self) -> tuple[str, str]:
        """The difference and its interval: +2.2 and [0.0, 7.2]."""
        task = self.reading.task
        return number(self.value, task, has_sign=True), interval(self.low, self.high, task)

    @property
    def reversed(self) -> "Rival":
        """The same seen from the other one: what it reads more than the lead."""
        finding = SEEN_FROM_THE_OTHER.get(self.finding, self.finding)
        return replace(self, finding=finding, value=-self.value, low=-self.high, high=-self.low)


def rivals_of(view: ReportView) -> list[Rival]:
    """Return the lead's other masks and the other models, the best first.

    Of a model it is the reading under the lead's mask, else that under its first mask.
    """
    lead = view.lead
    readings = view.compared
    chosen = []
    for key in dict.fromkeys(reading.model.key for reading in readings):
        of_model = [reading for reading in readings if reading.model.key == key]
        if key == lead.model.key:
            chosen += [reading for reading in of_model if reading is not lead]
            continue
        same_mask = [reading for reading in of_model if reading.mask == lead.mask]
        chosen += (same_mask or of_model)[:1]
    rivals = [compare_readings(view.comparisons, lead, reading) for reading in chosen]
    return sorted(rivals, key=lambda rival: rival.reading.rank(), reverse=True)


def compare_readings(differences: DataFrame, lead: SiteReading, reading: SiteReading) -> Rival:
    """Return a reading beside another, `lead`, from the differences on their task, data and seed."""
    rows = differences[differences["of"] == BEST_LAYER]
    if reading.model.key == lead.model.key:
        rows = rows[(rows["between"] == "masks") & (rows["model"] == lead.model.key)]
        of_lead, of_reading = lead.mask, reading.mask
    else:
        # a pair without a mask in common has both
        has_masks = rows["mask"].map(
            lambda mask: {*str(mask).split(", ")} == {lead.mask, reading.mask}
        )
        rows = rows[(rows["between"] == "models") & has_masks]
        of_lead, of_reading = lead.model.key, reading.model.key
    for row in rows.itertuples():
        if {row.first, row.second} != {of_reading, of_lead}:
            continue
        rival = Rival(
            reading=reading,
            finding=row.finding,
            value=row.difference,
            low=row.low,
            high=row.high,
            detectable=row.detectable,
        )
        if row.second == of_lead:
            return rival
        return rival.reversed
    return Rival(reading)


# ------------------------------------------------------------------------------------------------ sentences
def ranking(view: ReportView, rivals: Sequence[Rival]) -> list[str]:
    """Return the answer to "which reads best", and the sentence about the others."""
    lead = view.lead
    photos = f"{lead.images} {noun_of(lead.data)}s"
    where = describe_site(lead, view.best(lead))
    best = view.best(lead).value_text
    nearest = rivals[0]
    if len(rivals) > 1:
        answer = f"{lead.token} reads best: {best}% mIoU at {where}."
        compared = [rival for rival in rivals if rival.finding] or rivals
        others = [_in_list(view, rival) for rival in compared[:MOST_RIVALS]]
        if len(compared) > MOST_RIVALS:
            others.append(f"and {len(rivals) - MOST_RIVALS} more")
        elif len(rivals) > len(compared):
            others.append(f"and {len(rivals) - len(compared)} not compared")
        return [answer, f"Then {', '.join(others)}."]
    if nearest.finding in ALIKE:
        return _alike(view, nearest)
    answer = f"{lead.token} reads best: {best}% mIoU at {where}."
    other = view.best(nearest.reading)
    place = describe_site(nearest.reading, other)
    reads = f"{nearest.reading.token} reads {other.value_text}% at {place}"
    if nearest.finding is None:
        return [answer, f"{reads}; the two cannot be compared."]
    less = f"{number(nearest.value)} points less"
    if less.startswith("0.0"):
        return [answer, f"{reads}, as much."]
    if nearest.is_shown:
        return [answer, f"{reads}: {less}."]
    return [answer, f"{reads}: {less}, which {photos} do not show."]


def _in_list(view: ReportView, rival: Rival) -> str:
    """Return a rival in the sentence about several: A (50.8, not shown to be less)."""
    said = f"{number(rival.value)} less"
    if rival.finding is None:
        said = "not compared"
    elif rival.finding in ALIKE:
        said = "no less"
    elif not rival.is_shown:
        said = "not shown to be less"
    return f"{rival.reading.token} ({view.best(rival.reading).value_text}, {said})"


def _alike(view: ReportView, rival: Rival) -> list[str]:
    """Return the sentences about two readings whose difference is less than the margin."""
    lead = view.lead
    places = []
    for reading in (lead, rival.reading):
        place = its_site(reading.own[view.best(reading).site])
        if place not in places:
            places.append(place)
    both = f"{lead.token} and {rival.reading.token} read alike"
    return [
        f"{both}: {view.best(lead).value_text}% mIoU, at {' and '.join(places)}.",
        f"They differ by {number(rival.value)} points; a difference of {points(lead.margin)} is ruled out.",
    ]


def resize_note(rival: Rival, lead: SiteReading) -> str:
    """Return that two readings see photos in another way, "" if they do not."""
    resizes = [READ_BY.get(reading.resize, reading.resize) for reading in (lead, rival.reading)]
    if resizes[0] == resizes[1]:
        return ""
    return f" Their photos differ: {resizes[0]} and {resizes[1]}."


def describe_site(reading: SiteReading, row: Any) -> str:
    """Return the name of a site in a sentence that compares: layer 8, its last; its adapter."""
    site = reading.own[row.site]
    name = its_site(site)
    if reading.is_layer(row.site) and site_number(site) == reading.model.depth:
        return f"{name}, its last"
    return name


def would_show(rival: Rival, photos: int, noun: str) -> str:
    """Return which difference the photos would show, and how many photos the one that was seen takes."""
    if rival.is_shown:
        return ""
    seen = f"{photos} {noun}s would show {number(rival.detectable)}"
    if abs(rival.value) < rival.reading.margin or rival.finding is None:
        return f"{seen}."
    needed = photos * (rival.detectable / abs(rival.value)) ** 2
    if not photos < needed < MOST_TIMES * photos:
        return f"{seen}."
    return f"{seen}; about {_round_up(needed)} {noun}s, {number(abs(rival.value))}."


def _round_up(count: float) -> int:
    """Return a number of photos with two digits, or in tens."""
    step = max(10, 10 ** (len(str(int(count))) - 2))
    return math.ceil(count / step) * step
