"""`llava-bidir questions`: conversations about photos with masks, in LLaVA's JSON.

OUT/captions.json     the classes of each training photo as a sentence, for stage 1
OUT/dialogues.json    all questions about a training photo in one conversation, for stage 2
OUT/questions.json    one question about a validation photo per record, with "regions" for `probes answers`

DATA is a folder data set (probes/README.md, "Your own data"). What is asked: llava_bidir/data/mask_questions.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from llava_bidir.common.atomic_io import read_json, write_files
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.image_io import open_bounded, png_bits
from llava_bidir.data.mask_questions import (
    Facts,
    MaskQuestion,
    ask_in_pairs,
    find_facts,
    to_turns,
)

CAPTION = "Describe the picture."
SUFFIXES = (".jpg", ".jpeg", ".png")
IGNORED = 255
INVALID = -1
GRID = 4
PER_PHOTO = 6
HELD_OUT = 200
SEEN = ("there", "yes")

Records = dict[str, list[dict[str, Any]]]


def run(args: argparse.Namespace) -> None:
    """Run `llava-bidir questions`.

    Raises:
        UserError: OUT has other records already, or the photos give none.
    """
    if args.held_out < 2:
        raise UserError(
            f"--held-out must be at least 2, as questions come in pairs; got {args.held_out}"
        )
    records = build_records(
        args.data,
        seed=args.seed,
        grid=args.grid,
        per_photo=args.per_photo,
        held_out=args.held_out,
    )
    files = {args.out / f"{name}.json": rows for name, rows in records.items()}
    for file, rows in files.items():
        if not file.is_file():
            continue
        with error_context(file):
            earlier = json.loads(file.read_text())
        if earlier != rows:
            raise UserError(
                f"{file} has records of other photos or options; choose another --out, or delete it"
            )
    write_files(files)
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in records.items())
    print(f"{args.out}: {counts}; train with --data.images {args.data}")


def build_records(
    data: Path,
    *,
    seed: int = 0,
    grid: int = GRID,
    per_photo: int = PER_PHOTO,
    held_out: int = HELD_OUT,
    prefix: str = "",
) -> Records:
    """Return LLaVA's records by file name, without suffix.

    Args:
        data: Folder data set.
        seed: Seed of all random choices.
        grid: Cells per row and column of places that are asked about.
        per_photo: Questions about each training photo, on average.
        held_out: Questions about all validation photos.
        prefix: Put before the paths of images, which are relative to `data`.

    Raises:
        UserError: `data` is no folder data set, or its photos are too alike to be asked about.
    """
    classes, table = read_classes(data)
    rng = np.random.default_rng(seed)
    training = _read_facts(data, "training", classes, table, grid)
    validation = _read_facts(data, "validation", classes, table, grid)

    def ask(photos: dict[Path, Facts], questions: int) -> list[list[MaskQuestion]]:
        return ask_in_pairs([*photos.values()], questions // 2, rng)

    captions = []
    dialogues = []
    asked = ask(training, per_photo * len(training))
    for (photo, facts), of_photo in zip(training.items(), asked, strict=True):
        record = _record(data, photo, prefix)
        if caption := _caption(facts, rng):
            captions.append(record | {"conversations": to_turns([(CAPTION, caption)])})
        if of_photo:
            turns = to_turns([(question.text, question.answer) for question in of_photo])
            dialogues.append(record | {"conversations": turns})
    questions = []
    for photo, of_photo in zip(validation, ask(validation, held_out), strict=True):
        for question in of_photo:
            turns = to_turns([(question.text, question.answer)])
            record = _record(data, photo, prefix) | {"conversations": turns}
            questions.append(record | {"regions": [question.region]})
    records = {
        "captions": captions,
        "dialogues": dialogues,
        "questions": questions,
    }
    for name, rows in records.items():
        if not rows:
            raise UserError(
                f"{data}: its masks give no {name}; expected photos that show different classes"
            )
    return records


def read_classes(data: Path) -> tuple[list[str], np.ndarray]:
    """Return the names of the classes of a folder data set, and the index of each label, int16[256].

    A label that is ignored has `IGNORED`, one that stands for no class `INVALID`.

    Raises:
        UserError: classes.json is missing or names no classes.
    """
    file = data / "classes.json"
    if not file.is_file():
        raise UserError(
            f'{file} is missing; expected a folder data set with {{"classes": ["wall", ...]}} '
            "(probes/README.md, Your own data)"
        )
    settings = read_json(file)
    names = settings.get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{file} needs a list of names under 'classes'")
    first = settings.get("reduce_zero_label", False)
    if not isinstance(first, bool):
        raise UserError(f"{file}: reduce_zero_label must be true or false, got {first!r}")
    if not 0 < len(names) <= IGNORED - first:
        raise UserError(
            f"{file} names {len(names)} classes; expected 1 to {IGNORED - first}, for masks of 8 bits"
        )
    ignored = settings.get("ignore_index", IGNORED)
    ignored = ignored if isinstance(ignored, list) else [ignored]
    if not all(isinstance(label, int) for label in ignored):
        raise UserError(
            f"{file}: ignore_index must be a label or a list of labels, got {ignored!r}"
        )
    kept = [i for i in range(len(names)) if i + first not in ignored]
    table = np.full(256, INVALID, np.int16)
    table[[IGNORED, *(label for label in ignored if 0 <= label < 256)]] = IGNORED
    if first:
        table[0] = IGNORED
    for index, i in enumerate(kept):
        table[i + first] = index
    return [names[i] for i in kept], table


def _read_facts(
    data: Path,
    split: str,
    classes: list[str],
    table: np.ndarray,
    grid: int,
) -> dict[Path, Facts]:
    """Return what is true of each photo of a split, in the order of their names.

    Raises:
        UserError: There are no photos, or a mask is missing, damaged or of another size than its photo.
    """
    folder = data / "images" / split
    photos = []
    if folder.is_dir():
        photos = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not photos:
        raise UserError(f"{folder} has no photos; expected files that end in {', '.join(SUFFIXES)}")
    facts = {}
    for photo in photos:
        with error_context(photo), open_bounded(photo) as image:
            size = image.size
        file = data / "annotations" / split / f"{photo.stem}.png"
        with error_context(file):
            facts[photo] = find_facts(_read_mask(file, table, size), classes, grid)
    return facts


def _read_mask(file: Path, table: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the class of each pixel, uint8[H, W].

    Args:
        file: Mask.
        table: Index of each label, int16[256].
        size: Width and height of its photo.

    Raises:
        UserError: It has another size, is not of one 8-bit channel, or has a label without a class.
    """
    with open_bounded(file, ("PNG",)) as image:
        if image.mode not in ("L", "P"):
            raise UserError(f"has mode {image.mode}; expected one 8-bit class index per pixel")
        if image.mode == "L" and (bits := png_bits(file)) < 8:
            raise UserError(
                f"has {bits} bits per pixel, whose labels PIL reads as multiples of {255 // (2**bits - 1)}; "
                "save it as 8-bit PNG"
            )
        if image.size != size:
            raise UserError(f"has {image.size} px (width, height), and its photo {size}")
        labels = np.asarray(image)
    mask = table[labels]
    if wrong := np.unique(labels[mask == INVALID]).tolist():
        valid = np.flatnonzero(table != INVALID).tolist()
        raise UserError(
            f"has label {', '.join(map(str, wrong[:5]))}; classes.json allows {valid[0]} to {valid[-2]} and "
            f"{valid[-1]}"
        )
    return mask.astype(np.uint8)


def _record(data: Path, photo: Path, prefix: str) -> dict[str, Any]:
    name = prefix + photo.relative_to(data).as_posix()
    return {"id": name, "image": name}


def _caption(facts: Facts, rng: np.random.Generator) -> str | None:
    """Return, e.g., "A picture with road, sky and car." in random order; None if no class is seen."""
    shown = [name for (kind, name), fact in facts.items() if (kind, fact.answer) == SEEN]
    if not shown:
        return None
    *most, last = (str(name) for name in rng.permutation(shown))
    return f"A picture with {', '.join(most)} and {last}." if most else f"A picture with {last}."
