r"""LLaVA's JSON as a dataset: memory-mapped records, images read on access.

The format of the 558K captions and of the 665K mix::

    [{"id": "004539375",
      "image": "00453/004539375.jpg",          <- missing in text-only records
      "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                        {"from": "gpt", "value": "A cat."}]}, ...]

As in LLaVA, these records are valid:

- empty answers
- a first turn from gpt, which is dropped
- several `<image>` in a turn, which are merged
- an image without `<image>`: only the text is used
- `<image>` without an image: it is text
- `<image>` in an answer: the image is shown there, too

`llava-bidir verify-data` lists the last three. JSON Lines are read, too.

Records that cannot be trained on keep a description of their `problem`, so that
:mod:`llava_bidir.commands.verify_data` can report all of them at once.
"""

import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset

from llava_bidir.common.configs import how_to_make
from llava_bidir.common.errors import UserError

from .conversation import IMAGE, usable_turns
from .image_folder import BadImage, ImageFolder, check_name, read_image
from .json_stream import read_records

FEATURES = datasets.Features(
    id=datasets.Value("string"),
    image=datasets.Value("string"),
    conversations=datasets.List(
        {"from": datasets.Value("string"), "value": datasets.Value("string")}
    ),
    words=datasets.Value("int32"),
    shown=datasets.Value("int32"),
    answers=datasets.Value("int32"),
    before_image=datasets.Value("int32"),
    between_images=datasets.Value("int32"),
    placeholders=datasets.Value("int32"),
    unread=datasets.Value("string"),
    problem=datasets.Value("string"),
)
# By mask, the column of answers that tokens before them see: under `prefix`, all tokens up to the last image attend to
# each other; under `bidirectional`, an image before the answer attends to one after it. Other masks are not checked.
LATE_IMAGES = {"prefix": "before_image", "bidirectional": "between_images"}
KEYS = ("id", "image", "conversations")  # of a record that are read
# in keys that were meant as `image`
LIKE_IMAGE = re.compile("image|img|photo|picture|video", re.IGNORECASE)
LIKE_PLACEHOLDER = re.compile(r"<\s*image\s*>", re.IGNORECASE)
WRITER_BATCH_SIZE = 200  # records in memory during the conversion
COUNTS = (
    "words",
    "shown",
    "answers",
    "before_image",
    "between_images",
    "placeholders",
)
RULES = 5  # part of the cache key; increase it when the same file would be read differently


def check_annotations(path: str | Path) -> None:
    """Raise a UserError if there is no such file."""
    if not os.path.isfile(path):
        raise UserError(f"data.annotations: no file {path}{how_to_make(Path(path))}")


def read_annotations(path: str | Path) -> datasets.Dataset:
    """Return LLaVA's JSON as memory-mapped Arrow, converted once and cached; workers and ranks share one copy.

    Returns:
        Dataset with the columns

        - id: str
        - image: str, "" for text-only records
        - conversations: list of {from, value}
        - words: number of words in all turns, the length that LLaVA's sampler uses
        - shown: number of turns with `<image>`, 0 for text-only records
        - answers: number of answers that are not empty; only these are trained
        - before_image, between_images: number of those before the last `<image>`, and of those after the first one, too
        - placeholders: number of turns with `<image>`, also in other spellings such as `<Image>`
        - unread: str, other keys of the record, one a line
        - problem: str, why the record cannot be trained on, "" if it can

    Raises:
        UserError: The file cannot be read, is not a JSON list with records, or cannot be cached.
    """
    path = Path(path)
    check_annotations(path)
    datasets.disable_progress_bars()
    # size and modification time are part of the cache key, so that an edited file is read again
    source = {**fingerprint(path), "rules": RULES}
    try:
        return datasets.Dataset.from_generator(
            _records,
            features=FEATURES,
            gen_kwargs=source,
            writer_batch_size=WRITER_BATCH_SIZE,
        )
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
        if isinstance(cause, OSError):
            raise UserError(
                f"the records of {path} cannot be cached in {datasets.config.HF_DATASETS_CACHE}: {cause}; set HF_HOME "
                "to a folder with space that can be written"
            ) from error
        raise


def fingerprint(path: Path) -> dict[str, str | int]:
    """Return {"path", "size", "modified"}, which changes when the file is edited."""
    file = path.stat()
    return {
        "path": str(path.resolve()),
        "size": file.st_size,
        "modified": file.st_mtime_ns,
    }


def _records(
    path: str,
    size: int,
    modified: int,
    rules: int,
):
    for record in read_records(Path(path)):
        try:
            yield _read_record(record)
        except (UserError, RecursionError) as error:  # deep nesting cannot be printed
            empty = {"image": "", "conversations": []}
            empty |= dict.fromkeys(COUNTS, 0)
            yield {
                **empty,
                "unread": "",
                "id": _record_id(record),
                "problem": str(error),
            }


def _read_record(record: dict) -> dict:
    """Return the record as a row.

    Raises:
        UserError: The record cannot be trained on.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise UserError("expected an object with a list 'conversations'")
    turns = record["conversations"]
    used = usable_turns(turns)
    image = "" if record.get("image") is None else record["image"]
    if not isinstance(image, str):
        raise UserError(f"'image' must be the path of one image, got {str(image)[:80]!r}")
    check_name(image)
    shown = [i for i, turn in enumerate(used) if image and IMAGE in turn["value"]]

    def answered(turns):
        return sum(bool(turn["value"]) for turn in turns if turn["from"] == "gpt")

    return {
        "id": _record_id(record),
        "image": image,
        "conversations": [{"from": turn["from"], "value": turn["value"]} for turn in turns],
        "words": sum(len(turn["value"].split()) for turn in turns),
        "shown": len(shown),
        "answers": answered(used),
        "before_image": answered(used[: shown[-1]]) if shown else 0,
        "between_images": answered(used[shown[0] : shown[-1]]) if shown else 0,
        "placeholders": sum(bool(LIKE_PLACEHOLDER.search(turn["value"])) for turn in used),
        "unread": "\n".join(" ".join(key.split())[:50] for key in record if key not in KEYS),
        "problem": "",
    }


def _record_id(record: Any) -> str:
    value = record.get("id") if isinstance(record, dict) else None
    return str(value)[:200] if isinstance(value, str | int | float) else ""


def keys_like_image(record: dict) -> list[str]:
    """Return the keys of a record that are not read, but were probably meant as `image`."""
    return [key for key in record["unread"].splitlines() if LIKE_IMAGE.search(key)]


def has_first_answer(turns: list[dict]) -> bool:
    """Return whether the first question of a conversation has an answer that is not empty."""
    return any(turn["value"] for turn in usable_turns(turns)[1:2])


def image_names(records: datasets.Dataset) -> set[str]:
    """Return the paths of all images that records show, relative to their folder."""
    shown = pc.greater(records.data.column("shown"), 0)
    return set(records.data.column("image").filter(shown).unique().to_pylist())


class Instructions(Dataset):
    """Dataset of records with their image: {"id", "image": PIL or None, "conversations"}.

    A missing or broken image raises an error that names record and file; no other sample replaces it.
    `llava-bidir verify-data` finds such images before training.

    Args:
        annotations: LLaVA JSON file.
        images: Folder that image paths are relative to.
        follow_links: See :class:`.image_folder.ImageFolder`.

    Raises:
        UserError: Some records cannot be trained on; the message has their number and the first of them.
    """

    def __init__(self, annotations: str | Path, images: str | Path, follow_links: bool = False):
        self.annotations = annotations
        self.records = read_annotations(annotations)
        self.images = ImageFolder(images, follow_links)
        bad = np.flatnonzero(self._column("problem", lambda column: pc.not_equal(column, "")))
        if len(bad):
            rows = [(i, self.records[i]) for i in bad[:3].tolist()]
            first = "; ".join(f"record {i} (id {row['id']!r}): {row['problem']}" for i, row in rows)
            raise UserError(
                f"{annotations}: {len(bad)} of {len(self)} records cannot be trained on. {first}. "
                "Fix or remove them; `llava-bidir verify-data` lists all"
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        try:
            image = read_image(self.images.file(record["image"])) if record["shown"] else None
        except BadImage as error:
            raise UserError(f"record {index} (id {record['id']!r}): {error}") from None
        return {
            "id": record["id"] or f"number {index}",
            "image": image,
            "conversations": record["conversations"],
        }

    def check_answers(self) -> None:
        """Raise if the first answer of a record is missing or empty; validation compares with it.

        Raises:
            UserError: Names the number of such records and the first.
        """
        without = [
            number
            for number, turns in enumerate(self.records["conversations"])
            if not has_first_answer(turns)
        ]
        if without:
            name = self.records[int(without[0])]["id"]
            raise UserError(
                f"{self.annotations}: {len(without)} of {len(self)} records have no answer to compare with, e.g. "
                f"record {without[0]} (id {name!r}); remove them from data.val_annotations"
            )

    def check_trainable(self) -> None:
        """Raise if no record has an answer to train on, or if all images that the text refers to are missing.

        Raises:
            UserError: Names the number of records and the first of them.
        """
        if not self._column("answers").any():
            raise UserError(
                f"{self.annotations}: none of {len(self)} records has an answer to train on; expected a turn from "
                "'gpt' with text"
            )
        without = np.flatnonzero(self._column("placeholders"))
        if len(without) and not self._column("shown").any():
            first = self.records[int(without[0])]
            keys = ", ".join(map(repr, keys_like_image(first))) or "no key for it"
            raise UserError(
                f"{self.annotations}: no record shows an image, but {len(without)} of {len(self)} have {IMAGE} in "
                f"their text. Expected the key 'image' with one path, and {IMAGE} in a question; record {without[0]} "
                f"(id {first['id']!r}) has {repr('image') if first['image'] else keys}. `llava-bidir verify-data` "
                "lists all"
            )

    def check_mask(self, image_attention: str) -> None:
        """Raise if tokens can see the answer that they predict, through an image after it (`LATE_IMAGES`).

        Raises:
            UserError: Names the number of such records and the first.
        """
        column = LATE_IMAGES.get(image_attention)
        found = np.flatnonzero(self._column(column)) if column else []
        if len(found):
            name = self.records[int(found[0])]["id"]
            raise UserError(
                f"{self.annotations}: in {len(found)} of {len(self)} records an image follows an answer, e.g. record "
                f"{found[0]} (id {name!r}). Under model.image_attention {image_attention}, tokens that predict the "
                "answer would see it; remove these records, or split them before the image"
            )

    def _column(self, name: str, function=lambda column: column) -> np.ndarray:
        """Return a column, or a function of it, without creating Python objects."""
        return function(self.records.data.column(name)).to_numpy()

    def lengths(self) -> np.ndarray:
        """Return words per record, int32, negative without an image. Source: LLaVA train.py modality_lengths."""
        words = np.maximum(self._column("words"), 1)  # 0 has no sign
        return np.where(self._text_only(), -words, words).astype(np.int32)

    def _text_only(self) -> np.ndarray:
        return self._column("image", lambda column: pc.equal(column, ""))

    def summary(self, image_tokens: int, max_length: int) -> str:
        """Return one line about all records without tokenising; a text has at least as many tokens as words."""
        text_only = self._text_only()
        shown = self._column("shown")
        stray = ((self._column("placeholders") > 0) & (shown == 0)).sum()
        min_tokens = self._column("words") + shown * image_tokens
        unshown = (~text_only & (shown == 0)).sum()
        unanswered = (self._column("answers") == 0).sum()
        too_long = (min_tokens > max_length).sum()
        parts = [
            f"{len(self):,} records: {text_only.sum():,} text only",
            f"{unshown:,} with an image but no {IMAGE}",
            f"{unanswered:,} without an answer to train on",
            f"at least {too_long:,} longer than {max_length:,} tokens, which are truncated",
        ]
        if stray:
            parts.append(f"{stray:,} with {IMAGE} in their text but no image that is shown")
        return ", ".join(parts)
