"""Photos on the page, from runs' pictures.npz: what probes read at chosen sites, and where they are wrong."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from probes.ops.geometry import IGNORE_INDEX, ignored_label

from .readings import SiteReading

PALE, FULL = 56, 255  # opacity of what is right and wrong
PIXEL_ART = 128  # px, up to which a photo is shown without smoothing


def uri(image: Image.Image, kind: str = "png", **options: Any) -> str:
    """Return an image as a data URI."""
    content = io.BytesIO()
    image.save(content, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def map_uri(classes: np.ndarray, palette: np.ndarray, truth: np.ndarray | None = None) -> str:
    """Return classes [H, W] in their colours; with `truth`, right ones pale and those without a label none."""
    # the last one is also that of -1
    colours = np.zeros((max(len(palette), IGNORE_INDEX) + 1, 4), np.uint8)
    colours[: len(palette)] = np.pad(palette, [(0, 0), (0, 1)], constant_values=FULL)
    picture = colours[classes]
    if truth is not None:
        picture[classes == truth, 3] = PALE
        picture[truth == ignored_label(truth), 3] = 0
    return uri(Image.fromarray(picture))


def picture_uri(picture: np.ndarray) -> str:
    """Return a photo uint8[H, W, 3]: small ones exactly, others as a JPEG."""
    image = Image.fromarray(picture)
    return uri(image) if max(image.size) <= PIXEL_ART else uri(image, "jpeg", quality=86)


def right_share(classes: np.ndarray, truth: np.ndarray) -> str:
    """Return the share of labelled pixels that are right."""
    labelled = truth != ignored_label(truth)
    return f"{(classes == truth)[labelled].mean() if labelled.any() else 0:.0%}"


def map_of(reading: SiteReading, lead: SiteReading, photo: str, site: str) -> np.ndarray | None:
    """Return what a reading's probe sees in a photo of the lead at a site, None if that was not kept."""
    found, own = reading.pictures, lead.pictures
    index = f"{photo}/index"
    if index not in found or (found[index], found["data"]) != (own[index], own["data"]):
        return None
    sites = found["sites"].tolist()
    name = reading.own.get(site)
    return found[f"{photo}/maps"][sites.index(name)] if name in sites else None


def first_map(
    readings: Sequence[SiteReading], lead: SiteReading, photo: str, site: str
) -> tuple[str, np.ndarray] | None:
    """Return what the lead's probe sees, else another's, with the key of its model; None if none was kept."""
    for reading in (lead, *readings):
        predicted = map_of(reading, lead=lead, photo=photo, site=site)
        if predicted is not None:
            return reading.model.key, predicted
    return None


def classes_drawn(
    readings: Sequence[SiteReading], lead: SiteReading, photo: str, sites: Sequence[str]
) -> list[int]:
    """Return the classes that a photo's truth has or that are read at one of these sites, the most frequent first."""
    truth = lead.pictures[f"{photo}/truth"]
    drawn = [truth.ravel()]
    for site in sites:
        found = first_map(readings, lead=lead, photo=photo, site=site)
        if found:
            drawn.append(found[1].ravel())
    classes, counts = np.unique(np.concatenate(drawn), return_counts=True)
    return [
        int(k) for k in classes[np.argsort(-counts, kind="stable")] if k != ignored_label(truth)
    ]
