"""A sheet of eight photos with their masks over them, on which a person sees whether the masks fit.

Masks lie over the photos at 55% with white outlines; the name of a class stands in its largest region; what is ignored
is hatched. Below are the colours of the classes and their shares of the pixels that are shown.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt, find_objects, label

from probes.ops.geometry import ignored_label

from .image_dataset import SegmentationDataset, palette_of
from .verify import count_labels, join_counts

PHOTOS = 8
COLUMNS = 4
BOX = (400, 300)  # of a photo, px
GAP = 8
ROW = 20  # of the legend
LEGEND_WIDTH = 200
MOST_NAMED = 64  # classes in the legend
OPACITY = 0.55
HATCH = 8  # px between lines
SMALLEST_NAMED = 6  # px from the place of a name to its region's border


def draw_sheet(
    splits: Mapping[str, SegmentationDataset], pixels: Sequence[Sequence[int]]
) -> Image.Image:
    """Return the sheet of a data set.

    Args:
        splits: Its splits.
        pixels: Pixels of each class in each photo, [N, K], in the order of the splits.
    """
    photos = [(dataset, i) for dataset in splits.values() for i in range(len(dataset))]
    dataset, _ = photos[0]
    palette = palette_of(dataset)
    overlays = []
    targets = []
    for number in choose_photos(np.asarray(pixels)):
        of_split, index = photos[number]
        sample = of_split[index]
        photo, target = _shrink(sample["image"], sample["target"])
        overlay = draw_overlay(photo, target, palette=palette, classes=dataset.classes)
        overlays.append((sample["name"], overlay))
        targets.append(target)
    shares = _shares(targets, len(dataset.classes))
    by_share = np.argsort(-shares, kind="stable").tolist()
    named = [k for k in by_share[:MOST_NAMED] if shares[k]]
    width = COLUMNS * (BOX[0] + GAP) + GAP
    legend_columns = width // LEGEND_WIDTH
    legend_rows = -(-len(named) // legend_columns)
    photo_rows = -(-len(overlays) // COLUMNS)
    photo_height = BOX[1] + ROW + GAP
    top = photo_rows * photo_height + GAP
    sheet = Image.new("RGB", (width, top + legend_rows * ROW + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (name, overlay) in enumerate(overlays):
        row, column = divmod(place, COLUMNS)
        left = GAP + column * (BOX[0] + GAP)
        upper = GAP + row * photo_height
        sheet.paste(overlay, (left, upper + ROW))
        draw.text((left, upper + 4), name, fill="black")
    for place, k in enumerate(named):
        row, column = divmod(place, legend_columns)
        left = GAP + column * LEGEND_WIDTH
        upper = top + row * ROW
        colour = tuple(palette[k].tolist())
        draw.rectangle((left, upper + 3, left + 14, upper + 16), fill=colour)
        draw.text((left + 20, upper + 4), f"{shares[k]:.1%}  {dataset.classes[k]}", fill="black")
    return sheet


def choose_photos(pixels: ndarray) -> list[int]:
    """Return which photos are shown: each has the most classes that those before it lack, then the most classes.

    Args:
        pixels: Integers [N, K], pixels of each class in each photo.
    """
    has = pixels > 0
    missing = np.ones(has.shape[1], bool)
    chosen: list[int] = []
    for _ in range(min(PHOTOS, len(has))):
        new = (has & missing).sum(1)
        gain = new * (has.shape[1] + 1) + has.sum(1)
        gain[chosen] = -1
        best = int(gain.argmax())
        chosen.append(best)
        missing &= ~has[best]
    return chosen


def _shrink(image: Image.Image, target: ndarray) -> tuple[Image.Image, ndarray]:
    """Return a photo and its target at the size in which they are drawn."""
    scale = min(BOX[0] / image.width, BOX[1] / image.height)
    size = [max(1, round(side * scale)) for side in image.size]
    rows = np.arange(size[1]) * image.height // size[1]
    columns = np.arange(size[0]) * image.width // size[0]
    return image.resize(size), target[np.ix_(rows, columns)]


def _shares(targets: Sequence[ndarray], classes: int) -> ndarray:
    """Return the share of each class of all pixels, f[K]."""
    counts = join_counts([count_labels(target, classes) for target in targets])
    return np.array(counts.pixels) / sum(target.size for target in targets)


def draw_overlay(
    photo: Image.Image, target: ndarray, palette: ndarray, classes: Sequence[str]
) -> Image.Image:
    """Return a photo with its mask over it, outlines, and names."""
    is_ignored = target == ignored_label(target)
    colours = np.asarray(photo, np.float32).copy()
    labelled = np.where(is_ignored, 0, target)
    over = (1 - OPACITY) * colours + OPACITY * palette[labelled]
    colours = np.where(is_ignored[..., None], colours, over)
    rows, columns = np.indices(target.shape)
    hatched = is_ignored & ((rows + columns) % HATCH == 0)
    edges = np.zeros(target.shape, bool)
    edges[:, 1:] = target[:, 1:] != target[:, :-1]
    edges[1:] |= target[1:] != target[:-1]
    colours[hatched | edges] = 255
    overlay = Image.fromarray(colours.astype(np.uint8))
    draw = ImageDraw.Draw(overlay)
    font = ImageFont.load_default()
    for k in np.unique(target[~is_ignored]).tolist():
        place = _middle(target == k)
        if place is not None:
            column, row = place
            half = font.getlength(classes[k]) / 2 + 2
            column = max(half, min(column, photo.width - half))  # the whole name, also at an edge
            options = {"anchor": "mm", "stroke_width": 2, "stroke_fill": "black"}
            draw.text((column, row), classes[k], fill="white", font=font, **options)
    return overlay


def _middle(mask: ndarray) -> tuple[int, int] | None:
    """Return column and row of the innermost pixel of a mask's largest region; None if it is too small for a name."""
    regions, _ = label(mask)
    largest = np.bincount(regions.ravel())[1:].argmax() + 1
    box = find_objects(regions)[largest - 1]
    depth = distance_transform_edt(np.pad(regions[box] == largest, 1))[1:-1, 1:-1]
    if depth.max() < SMALLEST_NAMED:
        return None
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return int(column) + box[1].start, int(row) + box[0].start
