r"""Read questions about places: LLaVA's JSON with a region for each question.

    [{"image": "photos/7.jpg",
      "conversations": [{"from": "human", "value": "<image>\nWhat is at the top left?"},
                        {"from": "gpt", "value": "Sky."}],
      "regions": [{"box": [0, 0, 0.25, 0.25], "class": "sky"}]}, ...]

"regions" has one entry per question: its place as left, top, right and bottom in fractions of the image, and the class
there, which is one of the probes' classes; or null for a question that is not about a place, which is skipped. It can
have a "kind", else the first two words of the question are its kind. Each question is asked by itself, without the
turns before it.
"""

import os
from pathlib import Path
from typing import Annotated, NamedTuple, NotRequired

import torch
from PIL import Image
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from llava_bidir.common.errors import NothingToMeasure, UserError, error_context
from llava_bidir.common.images import as_stored, orientation, read_image
from probes.ops.geometry import Geometry

KIND_WORDS = 2  # of a question that is of no other kind
Fraction = Annotated[float, Field(ge=0, le=1)]
Region = TypedDict(
    "Region",
    {
        "box": Annotated[list[Fraction], Field(min_length=4, max_length=4)],
        "class": str,
        "kind": NotRequired[str],
    },
)
Region.__pydantic_config__ = ConfigDict(extra="forbid")  # a misspelt kind would be left out
Turn = TypedDict("Turn", {"from": str, "value": str})


class Record(TypedDict):
    """What is read of a record; other keys are ignored."""

    image: NotRequired[str | None]
    conversations: list[Turn]
    regions: NotRequired[list[Region | None] | None]


class Question(NamedTuple):
    """A question about a place in an image."""

    image: int  # index in QuestionFile.images
    text: str
    right: int  # index of the class at the place
    box: tuple[float, float, float, float]  # left, top, right, bottom; fractions of the image
    kind: str = ""  # questions of a kind are judged together


class QuestionFile(NamedTuple):
    """The questions about places of a file."""

    questions: list[Question]
    images: list[str]  # paths relative to the image folder, each once


def read_questions(path: Path, classes: list[str]) -> QuestionFile:
    """Return the questions about places in a file.

    Raises:
        UserError: The file is not of the format above, a class is not among `classes`, a box ends before it starts, or
            no question has a region.
    """
    with error_context(path):
        records = TypeAdapter(list[Record]).validate_json(path.read_bytes())
    questions: list[Question] = []
    images: dict[str, int] = {}
    for number, record in enumerate(records):
        asked = [turn for turn in record["conversations"] if turn["from"] == "human"]
        regions = record.get("regions")
        if not regions or not record.get("image"):
            continue
        if len(regions) != len(asked):
            raise UserError(
                f"{path}, record {number}: {len(regions)} regions for {len(asked)} questions; expected one for each, "
                "null for none"
            )
        for turn, region in zip(asked, regions, strict=True):
            if region is not None:
                _check_region(region, classes, where=f"{path}, record {number}")
                text = turn["value"].replace("<image>", "").strip()
                first_words = " ".join(text.lower().split()[:KIND_WORDS])
                question = Question(
                    image=images.setdefault(record["image"], len(images)),
                    text=text,
                    kind=region.get("kind", first_words),
                    right=classes.index(region["class"]),
                    box=tuple(region["box"]),
                )
                questions.append(question)
    if not questions:
        raise UserError(
            f"{path} has no question with an entry in 'regions'; expected a box and a class for each"
        )
    return QuestionFile(questions, list(images))


def _check_region(region: Region, classes: list[str], where: str) -> None:
    """Raise a UserError if the class of a region is not among `classes`, or its box ends before it starts."""
    if region["class"] not in classes:
        raise UserError(
            f"{where}: class {region['class']!r} is none of the probes': {', '.join(classes)}"
        )
    left, top, right, bottom = region["box"]
    if left > right or top > bottom:
        raise UserError(
            f"{where}: the box {region['box']} ends before it starts; expected left, top, right, bottom"
        )


def first_questions(path: Path, file: QuestionFile, limit: int | None) -> list[Question]:
    """Return the first `limit` questions of a file, None for all.

    Raises:
        NothingToMeasure: They are about one image. Intervals resample images, and one has no spread.
    """
    questions = file.questions[:limit]
    if len({question.image for question in questions}) < 2:
        which = "all questions"
        if limit is not None:
            which = f"the first {limit} questions (--limit)"
        raise NothingToMeasure(
            f"{path}: {which} are about one image; expected two or more, since intervals go by image"
        )
    return questions


def read_question_image(folder: Path, name: str) -> Image.Image:
    """Return an image of a question file as RGB; raise a UserError if it is not usable.

    It must be in the folder, readable, and upright as stored. A link in the folder may lead elsewhere: whoever made the
    folder made it, as `experiments/real` does for each data set. A name alone must not.
    """
    path = folder / name
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
        raise UserError(f"{name} leads out of {folder}; expected paths of images in it (--images)")
    tag, image = read_image(path, lambda image: (orientation(image), as_stored(image)))
    if tag != 1:
        raise UserError(
            f"{path} has EXIF orientation {tag}, so that its boxes may have been drawn on the stored or on the rotated "
            "image; rotate it (`mogrify -auto-orient`) or remove the tag (`exiftool -Orientation=`)"
        )
    return image


def tokens_in_box(
    geometry: Geometry, size: tuple[int, int], box: tuple[float, float, float, float]
) -> Tensor:
    """Return the image tokens whose centre is in a box, bool[T]; else the one nearest to the centre of the box.

    Args:
        geometry: The model's.
        size: Height and width of the image in pixels.
        box: left, top, right and bottom in fractions of the image.
    """
    geometry.check_one_square()
    view = geometry.view(size)
    inside = []
    for extent, length, nodes, low, high in (
        (view.rows, size[0], geometry.grid[0], box[1], box[3]),
        (view.cols, size[1], geometry.grid[1], box[0], box[2]),
    ):
        centres = extent.start_px + (torch.arange(nodes) + 0.5) * extent.length_px / nodes
        chosen = (centres >= low * length) & (centres < high * length)
        if not chosen.any():
            chosen[(centres - (low + high) / 2 * length).abs().argmin()] = True
        inside.append(chosen)
    return (inside[0][:, None] & inside[1]).flatten()
