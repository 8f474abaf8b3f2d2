"""LLaVA's JSON as a dataset: records memory-mapped, images opened when asked for.

The format, of the 558K captions and the 665K mix alike::

    [{"id": "004539375",
      "image": "00453/004539375.jpg",          <- left out for text-only records
      "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                        {"from": "gpt", "value": "A cat."}]}, ...]

What LLaVA trains on loads: empty answers, a first turn from gpt (dropped), several `<image>` in a turn (they become
one), an image that no `<image>` shows (its text is trained), `<image>` without an image (it is text). What cannot be
trained on is kept with its `problem`, so that all such records can be reported at once:
:mod:`llava_bidir.commands.verify_data`.
"""

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset

from llava_bidir.common.errors import UserError

from .conversation import IMAGE, check_turns
from .image_folder import BadImage, ImageFolder, check_name, read_image
from .json_stream import read_json_list

FEATURES = datasets.Features(
    id=datasets.Value("string"),
    image=datasets.Value("string"),
    conversations=datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    words=datasets.Value("int32"),
    shown=datasets.Value("int32"),
    answers=datasets.Value("int32"),
    problem=datasets.Value("string"),
)
RECORDS_AT_ONCE = 200  # in memory while they are converted
RULES = 2  # part of the cache's key: to be raised when the same file would be read differently


def read_annotations(path: str | Path) -> datasets.Dataset:
    """LLaVA's JSON as memory-mapped Arrow, so that workers and ranks share one copy; made once, then cached.

    Returns:
        Columns `id` (str), `image` (str, "" for text only), `conversations` (list of {from, value}), `words` (of all
        turns, which is what LLaVA's sampler goes by), `shown` (turns that show the image), `answers` (how many are not
        empty, for only those are trained) and `problem` (str, why the record cannot be trained on, "" where it can).

    Raises:
        UserError: The file cannot be read, is not a JSON list, or an empty one.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"data.annotations: no file {path}")
    datasets.disable_progress_bars()
    # size and time are part of the cache's key, so that an edited file is read again
    source = {**fingerprint(path), "rules": RULES}
    try:
        return datasets.Dataset.from_generator(
            _records, features=FEATURES, gen_kwargs=source, writer_batch_size=RECORDS_AT_ONCE
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise UserError(str(error.__cause__)) from None
        raise


def fingerprint(path: Path) -> dict[str, str | int]:
    """What tells one state of a file from another: {"path", "size", "modified"}."""
    file = path.stat()
    return {"path": str(path.resolve()), "size": file.st_size, "modified": file.st_mtime_ns}


def _records(path: str, size: int, modified: int, rules: int):
    empty = True
    for record in read_json_list(Path(path)):
        empty = False
        try:
            yield _read_record(record)
        except (ValueError, RecursionError) as error:  # too deep to be shown, too
            nothing = {"image": "", "conversations": [], "words": 0, "shown": 0, "answers": 0}
            yield {**nothing, "id": _id(record), "problem": str(error)}
    if empty:
        raise UserError(f"{path} has no records")


def _read_record(record: dict) -> dict:
    """The record as a row.

    Raises:
        UserError: Says why it cannot be trained on.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise UserError("expected an object with a list 'conversations'")
    turns = record["conversations"]
    used = check_turns(turns)
    image = "" if record.get("image") is None else record["image"]
    if not isinstance(image, str):
        raise UserError(f"'image' is the path of one image, got {str(image)[:80]!r}")
    check_name(image)
    for text in (image, *(turn["value"] for turn in turns)):
        _check_text(text)
    return {
        "id": _id(record),
        "image": image,
        "conversations": [{"from": turn["from"], "value": turn["value"]} for turn in turns],
        "words": sum(len(turn["value"].split()) for turn in turns),
        "shown": sum(IMAGE in turn["value"] for turn in used) if image else 0,
        "answers": sum(bool(turn["value"]) for turn in used[1::2]),
        "problem": "",
    }


def _id(record: Any) -> str:
    name = record.get("id") if isinstance(record, dict) else None
    text = str(name) if isinstance(name, str | int | float) else ""
    return text[:200].encode(errors="backslashreplace").decode()  # long enough to find it


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can say \\ud83d without the other half
        raise UserError(f"half a character, {error.object[error.start]!r}, in {text[:80]!r}") from None


class Instructions(Dataset):
    """Records with their image opened: {"id", "image": PIL or None, "conversations"}.

    An image that is missing or broken when its turn comes is an error that names record and file, never replaced by
    another sample: `llava-bidir verify-data` finds such before training does. How images are read: :mod:`.images`.

    Args:
        annotations: LLaVA JSON file.
        images: Folder that the records' image paths start from.
        follow_links: As of :class:`.images.ImageFolder`.

    Raises:
        UserError: Some records cannot be trained on; says how many and which.
    """

    def __init__(self, annotations: str | Path, images: str | Path, follow_links: bool = False):
        self.annotations, self.records = annotations, read_annotations(annotations)
        self.images = ImageFolder(images, follow_links)
        bad = np.flatnonzero(self._column("problem", lambda column: pc.not_equal(column, "")))
        if len(bad):
            first = [
                f"record {i} (id {self.records[i]['id']!r}): {self.records[i]['problem']}" for i in bad[:3].tolist()
            ]
            raise UserError(
                f"{annotations}: {len(bad)} of {len(self)} records cannot be trained on. "
                + "; ".join(first)
                + ". Mend or remove them; `llava-bidir verify-data` lists all"
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        try:
            image = read_image(self.images.file(record["image"])) if record["shown"] else None
        except BadImage as error:
            raise UserError(f"record {index} (id {record['id']!r}): {error}") from None
        return {"id": record["id"], "image": image, "conversations": record["conversations"]}

    def check_answers(self) -> None:
        """For validation, which compares with the first answer.

        Raises:
            UserError: Some records have none; says how many and names one.
        """
        without = np.flatnonzero(self._column("answers") == 0)
        if len(without):
            name = self.records[int(without[0])]["id"]
            raise UserError(
                f"{self.annotations}: {len(without)} of {len(self)} records have no answer to compare with, record "
                f"{without[0]} (id {name!r}) for one"
            )

    def _column(self, name: str, function=lambda column: column) -> np.ndarray:
        """A column, or a function of it, without making Python objects of it."""
        return function(self.records.data.column(name)).to_numpy()

    def lengths(self) -> np.ndarray:
        """int32[records]: words of each, negative where there is no image. Source: LLaVA train.py modality_lengths."""
        words = np.maximum(self._column("words"), 1)  # a sign needs something to stand before
        return np.where(self._text_only(), -words, words).astype(np.int32)

    def _text_only(self) -> np.ndarray:
        return self._column("image", lambda column: pc.equal(column, ""))

    def summary(self, image_tokens: int, max_length: int) -> str:
        """One line about all records, without tokenising them: a text has at least as many tokens as words."""
        text_only, shown = self._text_only(), self._column("shown")
        least = self._column("words") + shown * image_tokens
        return (
            f"{len(self):,} records: {text_only.sum():,} text only, {(~text_only & (shown == 0)).sum():,} with an "
            f"image that no {IMAGE} shows, {(self._column('answers') == 0).sum():,} without an answer to train on, "
            f"at least {(least > max_length).sum():,} longer than {max_length:,} tokens, which are cut"
        )
