r"""LLaVA's JSON as a dataset: memory-mapped records, images read on access.

The format of the 558K captions and of the 665K mix, a list or JSON Lines::

    [{"id": "004539375",
      "image": "00453/004539375.jpg",          <- missing in text-only records
      "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                        {"from": "gpt", "value": "A cat."}]}, ...]

As in LLaVA, these records are valid:

- empty answers, unless all are
- a first turn from gpt, which is dropped
- several `<image>` in a turn, which are merged
- an image without `<image>`: only the text is used
- `<image>` without an image: it is text
- `<image>` in an answer: the image is shown there, too

`llava-bidir verify-data` lists empty answers, images without `<image>` and the reverse.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import atomic_write, names_full_disk, sha256
from llava_bidir.common.images import read_image

from .collate import Collate
from .conversation import IGNORE_INDEX, IMAGE_PLACEHOLDER, usable_turns

TEXT = pa.string()
TURN = pa.struct({"from": TEXT, "value": TEXT})
SCHEMA = pa.schema(
    {"id": TEXT, "image": TEXT, "conversations": pa.list_(TURN), "length": pa.int32()}
)
ROWS = 1000  # of a batch of Arrow
RULES = 8  # part of the cache's name; increase it when the same file would be read differently
SET_HF_HOME = "set HF_HOME to a folder that has space and can be written"


class Conversation(TypedDict, total=False):
    """A record: `image` is its path, "" without one, or as a sample the image that is shown, None without one."""

    id: str
    image: str | Image.Image | None
    conversations: list[dict[str, str]]
    length: int


def read_annotations(path: str | Path) -> datasets.Dataset:
    """Return LLaVA's JSON as memory-mapped Arrow, converted once and cached; workers and ranks share one copy.

    Returns:
        Dataset with the columns

        - id: str
        - image: str, "" for text-only records
        - conversations: list of {from, value}, the turns from the first question on
        - length: number of words in all turns, at least 1, negative without an image. Source: LLaVA train.py
          modality_lengths

    Raises:
        UserError: A record cannot be trained on, or the file cannot be read.
    """
    with error_context("data.annotations"):
        digest = sha256(Path(path))
    # named by the content: an archive that is unpacked over a file keeps size and modification time
    cache = Path(datasets.config.HF_DATASETS_CACHE, f"llava_bidir-{RULES}-{digest}.arrow")
    if not cache.exists():
        with names_full_disk(cache.parent, SET_HF_HOME):
            cache.parent.mkdir(parents=True, exist_ok=True)
            # jobs that start together
            with FileLock(f"{cache}.lock"):
                _convert(path, cache)
    return datasets.Dataset.from_file(str(cache))


def _convert(path: str | Path, cache: Path) -> None:
    """Write the rows of a file as Arrow, unless another process has."""
    if cache.exists():
        return
    rows = _rows(path)
    with (
        atomic_write(cache, SET_HF_HOME) as partial,
        pa.RecordBatchStreamWriter(str(partial), SCHEMA) as writer,
    ):
        while some := [*islice(rows, ROWS)]:
            writer.write_table(pa.Table.from_pylist(some, SCHEMA))


def read_records(path: str | Path) -> list[Any]:
    """Return the records of a UTF-8 file, a JSON list or JSON Lines.

    Raises:
        UserError: Names the file and the place where it is malformed.
    """
    with error_context(path):
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        if text.startswith("{"):  # JSON Lines, in which a line break is between records only
            text = "[" + re.sub(r"\s*\n\s*", ",\n", text) + "]"
        records = json.loads(text)
        if not isinstance(records, list) or not records:
            raise UserError("expected records, as in a JSON list [{...}, ...]")
        return records


def _rows(path: str | Path) -> Iterator[Conversation]:
    """Yield the rows of a file.

    Raises:
        UserError: A record cannot be trained on.
    """
    for number, record in enumerate(read_records(path)):
        with error_context(f"{path}: record {number}"):
            turns = record["conversations"]
            image = record.get("image") or ""
            if not isinstance(image, str) or image.startswith("/") or ".." in image.split("/"):
                raise UserError(
                    f"'image' must be the path of one image inside data.images, got {image!r}"
                )
            row: Conversation = {
                "id": str(record.get("id", "")),
                "image": image,
                "conversations": usable_turns(turns),
            }
            words = sum(len(turn["value"].split()) for turn in turns)
            row["length"] = max(words, 1)  # 0 has no sign
            if not image:
                row["length"] *= -1
        yield row


def shows_image(record: Conversation) -> bool:
    """Return whether the model is shown the image of a record."""
    texts = (turn["value"] for turn in record["conversations"])
    return bool(record["image"]) and any(IMAGE_PLACEHOLDER in text for text in texts)


def refers_to_image(record: Conversation) -> bool:
    """Return whether a record has `<image>` in its text, also in another spelling such as `<Image>`."""
    return any(IMAGE_PLACEHOLDER in turn["value"].lower() for turn in record["conversations"])


class Instructions(Dataset):
    """Dataset of records with their image: {"id", "image": PIL or None, "conversations"}.

    A missing or broken image raises an error that names record and file; no other sample replaces it.
    `llava-bidir verify-data` finds such images before training.

    Args:
        annotations: LLaVA JSON file.
        images: Folder that image paths are relative to.

    Raises:
        UserError: There is no such folder, or as :func:`read_annotations`.
    """

    def __init__(self, annotations: str | Path, images: str | Path):
        self.annotations = annotations
        self.records = read_annotations(annotations)
        self.images = Path(images)
        if not self.images.is_dir():
            raise UserError(f"data.images: no folder {images}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Conversation:
        record = self.records[index]
        image = None
        if shows_image(record):
            with error_context(f"record {index} (id {record['id']!r})"):
                image = read_image(self.images / record["image"])
        return {
            "id": record["id"] or f"number {index}",
            "image": image,
            "conversations": record["conversations"],
        }

    def without_pixels(self, index: int) -> Conversation:
        """Return a record as a sample with a black image in place of its own, which is not opened."""
        record = self.records[index]
        image = Image.new("RGB", (1, 1)) if shows_image(record) else None
        return record | {"image": image}

    def check_trainable(self, collate: Collate) -> None:
        """Raise a UserError if no record trains an answer, or texts refer to images, but no record shows one."""

        def trains(record: Conversation) -> bool:
            """Return whether a token of an answer with text is within the sequence."""
            if not any(answers(record)):
                return False
            _, labels = collate.truncated(record | {"image": shows_image(record) or None})
            return any(label != IGNORE_INDEX for label in labels)

        if not any(map(trains, self.records)):
            raise UserError(
                f"{self.annotations}: no record has an answer to train on; expected turns from 'gpt' with text, before "
                f"token {collate.max_length}, the limit by data.max_length or by the LLM's positions"
            )
        if any(map(refers_to_image, self.records)) and not any(map(shows_image, self.records)):
            raise UserError(
                f"{self.annotations}: no record shows an image, but texts have {IMAGE_PLACEHOLDER}; expected the key "
                f"'image' with one path, and {IMAGE_PLACEHOLDER} in a question"
            )

    def lengths(self) -> np.ndarray:
        """Return the length of each record, int32[records]."""
        return self.records.data.column("length").to_numpy()


def answers(record: Conversation) -> list[str]:
    """Return the answers of a record, without the white space around them."""
    return [turn["value"].strip() for turn in record["conversations"][1::2]]
