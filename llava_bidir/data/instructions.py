"""LLaVA's JSON as a dataset: records memory-mapped, images opened when asked for.

The format, of the 558K captions and the 665K mix alike::

    [{"id": "004539375",
      "image": "00453/004539375.jpg",          <- left out for text-only records
      "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                        {"from": "gpt", "value": "A cat."}]}, ...]

What LLaVA trains on loads: empty answers, a first turn from gpt (dropped), several `<image>` in a turn (they become
one), an image that no `<image>` shows (its text is trained), `<image>` without an image (it is text). What cannot be
trained on is kept with its `problem`, so that all such records can be reported at once: :mod:`llava_bidir.verify`.
"""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from .conversation import IMAGE, check_turns

FEATURES = datasets.Features(
    id=datasets.Value("string"),
    image=datasets.Value("string"),
    conversations=datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
    words=datasets.Value("int32"),
    shown=datasets.Value("int32"),
    answers=datasets.Value("int32"),
    problem=datasets.Value("string"),
)
RULES = 1  # part of the cache's key: to be raised when the same file would be read differently


def read_annotations(path: str | Path) -> datasets.Dataset:
    """LLaVA's JSON as memory-mapped Arrow, so that workers and ranks share one copy; made once, then cached.

    Returns:
        Columns `id` (str), `image` (str, "" for text only), `conversations` (list of {from, value}), `words` (of all
        turns, which is what LLaVA's sampler goes by), `shown` (turns that show the image), `answers` (how many are not
        empty, for only those are trained) and `problem` (str, why the record cannot be trained on, "" where it can).

    Raises:
        ValueError: The file is not a JSON list.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data.annotations: no file {path}")
    datasets.disable_progress_bars()
    # size and time are part of the cache's key, so that an edited file is read again
    source = {**fingerprint(path), "rules": RULES}
    try:
        return datasets.Dataset.from_generator(_records, features=FEATURES, gen_kwargs=source)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from None
        raise


def fingerprint(path: Path) -> dict[str, str | int]:
    """What tells one state of a file from another: {"path", "size", "modified"}."""
    file = path.stat()
    return {"path": str(path.resolve()), "size": file.st_size, "modified": file.st_mtime_ns}


def _records(path: str, size: int, modified: int, rules: int):
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not UTF-8 JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of records, got {type(records).__name__}")
    for record in records:
        try:
            yield _read_record(record)
        except ValueError as error:
            name = str(record.get("id", "")) if isinstance(record, dict) else ""
            empty = {"id": name, "image": "", "conversations": [], "words": 0, "shown": 0, "answers": 0}
            yield {**empty, "problem": str(error)}


def _read_record(record: dict) -> dict:
    """The record as a row.

    Raises:
        ValueError: Says why it cannot be trained on.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise ValueError("expected an object with a list 'conversations'")
    turns = record["conversations"]
    used = check_turns(turns)
    image = record.get("image") or ""
    if not isinstance(image, str):
        raise ValueError(f"'image' is the path of one image, got {str(image)[:80]!r}")
    return {
        "id": str(record.get("id", "")),
        "image": image,
        "conversations": [{"from": turn["from"], "value": turn["value"]} for turn in turns],
        "words": sum(len(turn["value"].split()) for turn in turns),
        "shown": sum(IMAGE in turn["value"] for turn in used) if image else 0,
        "answers": sum(bool(turn["value"]) for turn in used[1::2]),
        "problem": "",
    }


class Instructions(Dataset):
    """Records with their image opened: {"id", "image": PIL or None, "conversations"}.

    An image that is missing or broken when its turn comes is an error that names record and file, never replaced by
    another sample: `llava-bidir verify-data` finds such before training does. Images are read as they are stored; like
    LLaVA, an EXIF rotation is not applied.

    Args:
        annotations: LLaVA JSON file.
        images: Folder that the records' image paths start from.

    Raises:
        ValueError: Some records cannot be trained on; says how many and which.
    """

    def __init__(self, annotations: str | Path, images: str | Path):
        self.records = read_annotations(annotations)
        self.images = Path(images)
        if not self.images.is_dir():
            raise ValueError(f"data.images: no folder {self.images}")
        bad = np.flatnonzero(self._column("problem", lambda column: pc.not_equal(column, "")))
        if len(bad):
            first = [
                f"record {i} (id {self.records[i]['id']!r}): {self.records[i]['problem']}" for i in bad[:3].tolist()
            ]
            raise ValueError(
                f"{annotations}: {len(bad)} of {len(self)} records cannot be trained on. "
                + "; ".join(first)
                + ". Mend or remove them; `llava-bidir verify-data` lists all"
            )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        image = self._open(record) if record["shown"] else None
        return {"id": record["id"], "image": image, "conversations": record["conversations"]}

    def _open(self, record: dict) -> Image.Image:
        path = self.images / record["image"]
        try:
            return Image.open(path).convert("RGB")
        except FileNotFoundError:
            raise ValueError(f"record {record['id']!r}: image {path} is missing") from None
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"record {record['id']!r}: image {path} cannot be read: {error}") from None

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
