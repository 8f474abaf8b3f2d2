"""Photos on the page, from runs' pictures.npz: what probes read at chosen sites, and where they are wrong."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from probes.ops.geometry import IGNORE_INDEX, ignored_label

from .readings import SiteReading

WHITE = 255
PALE = 0.25  # share of the colour of what is right
PHOTO_PX = 256  # twice as wide as it is shown
PIXEL_ART = 128  # px, up to which a photo is shown without smoothing


def uri(image: Image.Image, kind: str = "png", **options: Any) -> str:
    """Return an image as a data URI."""
    content = io.BytesIO()
    image.save(content, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def map_uri(classes: np.ndarray, palette: np.ndarray, truth: np.ndarray | None = None) -> str:
    """Return classes [H, W] in their colours; with `truth`, right ones pale. Without a label there is no colour.

    The page hatches what is behind a picture.
    """
    # the last one is also that of -1
    colours = np.full((max(len(palette), IGNORE_INDEX) + 1, 3), WHITE, np.uint8)
    colours[: len(palette)] = palette
    pale = (PALE * colours + (1 - PALE) * WHITE).round().astype(np.uint8)
    picture = colours[classes]
    ignored = classes == ignored_label(classes)
    if truth is not None:
        right = classes == truth
        picture[right] = pale[classes[right]]
        ignored = truth == ignored_label(truth)
    opacity = np.where(ignored, 0, WHITE).astype(np.uint8)
    return uri(with_palette(np.dstack([picture, opacity])))


def with_palette(picture: np.ndarray) -> Image.Image:
    """Return a picture uint8[H, W, 3 or 4], with a palette if it has few colours: its file is a third as large."""
    image = Image.fromarray(picture)
    channels = picture.shape[-1]
    digits = 256 ** np.arange(channels)
    numbers, first, index = np.unique(picture @ digits, return_index=True, return_inverse=True)
    if len(numbers) > 256:
        return image
    colours = picture.reshape(-1, channels)[first]
    indexed = Image.fromarray(index.reshape(picture.shape[:2]).astype(np.uint8), "P")
    indexed.putpalette(colours[:, :3].tobytes())
    if channels == 4:
        indexed.info["transparency"] = colours[:, 3].tobytes()
    return indexed


def picture_uri(picture: np.ndarray) -> str:
    """Return a picture uint8[H, W, 3 or 4]: maps and small ones exactly, photos as a JPEG of the size that is shown."""
    image = with_palette(picture)
    if image.mode == "P" or max(image.size) <= PIXEL_ART:
        return uri(image)
    image.thumbnail((PHOTO_PX, PHOTO_PX))
    return uri(image, "jpeg", quality=82)


def right_share(classes: np.ndarray, truth: np.ndarray) -> str:
    """Return the share of labelled pixels that are right."""
    labelled = truth != ignored_label(truth)
    if not labelled.any():
        return "0%"
    right = (classes == truth)[labelled]
    return f"{right.mean():.0%}"


def has_same_photo(reading: SiteReading, lead: SiteReading, photo: str = "typical") -> bool:
    """Return whether a reading has kept a photo of the lead."""
    kept, of_lead = reading.pictures, lead.pictures
    index = f"{photo}/index"
    if index not in kept or index not in of_lead:
        return False
    return (kept[index], kept["data"]) == (of_lead[index], of_lead["data"])


def map_of(reading: SiteReading, lead: SiteReading, photo: str, site: str) -> np.ndarray | None:
    """Return what a reading's probe sees in a photo of the lead at a site, None if that was not kept."""
    if not has_same_photo(reading, lead, photo):
        return None
    sites = reading.pictures["sites"].tolist()
    name = reading.own.get(site)
    if name not in sites:
        return None
    return reading.pictures[f"{photo}/maps"][sites.index(name)]


def classes_drawn(
    readings: Sequence[SiteReading], lead: SiteReading, photo: str, sites: Sequence[Sequence[str]]
) -> list[int]:
    """Return the classes that a photo's truth has or that are drawn, the most frequent first.

    Args:
        readings: Of the rows of pictures.
        lead: Whose photo it is.
        photo: Its name.
        sites: Of each reading.
    """
    truth = lead.pictures[f"{photo}/truth"]
    drawn = [truth.ravel()]
    for reading, of_reading in zip(readings, sites, strict=True):
        for site in of_reading:
            predicted = map_of(reading, lead=lead, photo=photo, site=site)
            if predicted is not None:
                drawn.append(predicted.ravel())
    classes, counts = np.unique(np.concatenate(drawn), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [k for k in classes[order].tolist() if k != ignored_label(truth)]
