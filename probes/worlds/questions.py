"""`probes questions`: conversations about photos with masks, in LLaVA's JSON.

OUT/captions.json     the classes of each training photo as a sentence, for stage 1
OUT/dialogues.json    all questions about a training photo in one conversation, for stage 2
OUT/questions.json    one question about a validation photo per record, with "regions" for `probes routes`

DATA is a folder data set (probes/README.md, "Your own data"). What is asked: mask_questions.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.errors import UserError, error_context
from probes.data.folder import FolderDataset
from probes.world_options import QuestionsOptions

from .english import CAPTION
from .mask_questions import HELD_OUT, Facts, MaskQuestion, ask_in_pairs, find_facts, to_turns

GRID = 4
PER_PHOTO = 6
SEEN = ("there", "yes")

Records = dict[str, list[dict[str, Any]]]


def run(options: QuestionsOptions) -> None:
    """Run `probes questions`.

    Raises:
        UserError: OUT has other records already, or the photos give none.
    """
    if options.held_out < 2:
        raise UserError(
            f"--held-out must be at least 2, as questions come in pairs; got {options.held_out}"
        )
    records = build_records(
        options.data,
        seed=options.seed,
        grid=options.grid,
        per_photo=options.per_photo,
        held_out=options.held_out,
    )
    files = {options.out / f"{name}.json": rows for name, rows in records.items()}
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
    print(f"{options.out}: {counts}; train with --data.images {options.data}")


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
    rng = np.random.default_rng(seed)
    training = _read_facts(data, "training", grid)
    validation = _read_facts(data, "validation", grid)

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


def _read_facts(data: Path, split: str, grid: int) -> dict[Path, Facts]:
    """Return what is true of each photo of a split, in the order of their names.

    Raises:
        UserError: `data` is no folder data set, or a photo or its mask cannot be read.
    """
    dataset = FolderDataset(data, split)
    facts = {}
    for index in range(len(dataset)):
        photo = dataset.files(index)[0]
        facts[photo] = find_facts(dataset[index]["target"], dataset.classes, grid)
    return facts


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
