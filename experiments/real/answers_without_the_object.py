"""Cover what held-out questions are about in their photos, and count the answers that are still right.

    python -m experiments.real.answers_without_the_object MODEL QUESTIONS.json IMAGES [--batch-size 8]

MODEL is a checkpoint of ours; QUESTIONS.json and IMAGES are those of `run.py --photos`. Each question is
asked three times: about the photo, about it with the object covered in the photo's mean colour, and with as much
covered elsewhere: the same pixels turned by half a circle about the photo's centre, without those of the object. The
object is the place of the question; of "Is there any CLASS", asked where there is one, the pixels of the class in the
mask. Questions whose object fills so much that less than half as much can be covered elsewhere are left out.

Printed by data set and kind, in %: answers that are right, and the change by covering the object instead of another
place, with the normal 95% interval of the paired difference.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.real.answers_by_kind import ask, parse_arguments, question_of, row_of
from llava_bidir.common.images import read_image


def object_pixels(record: dict, images: Path, size: tuple[int, int]) -> np.ndarray | None:
    """Return the pixels that a question is about, bool[H, W], or None if it is about none."""
    width, height = size
    region = record["regions"][0]
    if region is not None:
        left, top, right, bottom = region["box"]
        pixels = np.zeros((height, width), dtype=bool)
        rows = slice(round(top * height), round(bottom * height))
        columns = slice(round(left * width), round(right * width))
        pixels[rows, columns] = True
        return pixels
    if record["conversations"][1]["value"] != "yes":
        return None
    photo = images / record["image"]
    root = photo.parents[2]
    classes = json.loads((root / "classes.json").read_text())["classes"]
    name = question_of(record).removeprefix("Is there any ").removesuffix(" in the picture?")
    mask = root / "annotations" / photo.parent.name / f"{photo.stem}.png"
    return np.asarray(Image.open(mask)) == classes.index(name)


def cover(photo: Image.Image, pixels: np.ndarray) -> Image.Image:
    """Return the photo with these pixels in its mean colour."""
    colours = np.array(photo)
    colours[pixels] = colours.reshape(-1, 3).mean(0).astype(np.uint8)
    return Image.fromarray(colours)


def three_photos(record: dict, images: Path) -> list[Image.Image] | None:
    """Return the photo, without the object, and without as much elsewhere; None for a question that is left out."""
    photo = read_image(images / record["image"])
    inside = object_pixels(record, images, photo.size)
    if inside is None:
        return None
    elsewhere = inside[::-1, ::-1] & ~inside
    if 2 * elsewhere.sum() < inside.sum():
        return None
    return [photo, cover(photo, inside), cover(photo, elsewhere)]


def main() -> None:
    """Print a row for each data set and kind."""
    args = parse_arguments(__doc__)
    asked = []
    for record in json.loads(args.questions.read_text()):
        photos = three_photos(record, args.images)
        if photos is not None:
            asked += [(record, photo) for photo in photos]
    right = []
    for (record, _), words in zip(asked, ask(args, asked), strict=True):
        right.append(words == record["conversations"][1]["value"])
    by_kind = defaultdict(list)
    by_question = np.reshape(right, (-1, 3))
    for (record, _), scores in zip(asked[::3], by_question, strict=True):
        by_kind[row_of(record)].append(scores)
    columns = f"{'photo':>8}{'object':>8}{'elsewhere':>11}"
    print(f"{'data set':16}{'kind':8}{'questions':>10}{columns}  object minus elsewhere")
    for (data, kind), scores in by_kind.items():
        _, without_object, without_other = np.array(scores, dtype=float).T
        change = 100 * (without_object - without_other)
        half_width = 1.96 * change.std(ddof=1) / np.sqrt(len(change))
        shares = 100 * np.mean(scores, axis=0)
        columns = f"{shares[0]:8.1f}{shares[1]:8.1f}{shares[2]:11.1f}"
        print(
            f"{data:16}{kind:8}{len(scores):10}{columns}  {change.mean():+.1f} +/- {half_width:.1f}"
        )


if __name__ == "__main__":
    main()
