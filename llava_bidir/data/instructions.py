"""LLaVA's JSON as a dataset: records memory-mapped, images opened when asked for.

The format, of the 558K captions and the 665K mix alike::

    [{"id": "004539375",
      "image": "00453/004539375.jpg",          <- left out for text-only records
      "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                        {"from": "gpt", "value": "A cat."}]}, ...]
"""

import json
from pathlib import Path

import datasets
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from .conversation import IMAGE


def read_annotations(path: str | Path) -> datasets.Dataset:
    """LLaVA's JSON as memory-mapped Arrow, so that workers and ranks share one copy; made once, then cached.

    Returns:
        Columns `id` (str), `image` (str, "" for text only), `conversations` (list of {from, value}) and `words` (of
        all turns, which is what LLaVA's sampler goes by).

    Raises:
        ValueError: The file or a record is not as described above.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data.annotations: no file {path}")
    datasets.disable_progress_bars()
    file = path.stat()
    features = datasets.Features(
        id=datasets.Value("string"),
        image=datasets.Value("string"),
        conversations=datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
        words=datasets.Value("int32"),
    )
    # size and time are part of the cache's key, so that an edited file is read again
    source = {"path": str(path.resolve()), "size": file.st_size, "modified": file.st_mtime_ns}
    try:
        return datasets.Dataset.from_generator(_records, features=features, gen_kwargs=source)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from None
        raise


def _records(path: str, size: int, modified: int):
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not UTF-8 JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of records, got {type(records).__name__}")
    for index, record in enumerate(records):
        yield _read_record(record, f"{path}, record {index}")


def _read_record(record: dict, where: str) -> dict:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise ValueError(f"{where}: expected an object with a list 'conversations'")
    turns = record["conversations"]
    if not all(isinstance(t, dict) and isinstance(t.get("value"), str) and "from" in t for t in turns):
        raise ValueError(f"{where} (id {record.get('id')!r}): each turn needs 'from' and a text 'value'")
    has_image_tag = any(IMAGE in turn["value"] for turn in turns)
    image = record.get("image") or ""
    if bool(image) != has_image_tag:
        raise ValueError(
            f"{where} (id {record.get('id')!r}): "
            + (f"it has image {image!r} but no {IMAGE} in its turns" if image else f"it has {IMAGE} but no 'image'")
        )
    return {
        "id": str(record.get("id", "")),
        "image": image,
        "conversations": [{"from": turn["from"], "value": turn["value"]} for turn in turns],
        "words": sum(len(turn["value"].split()) for turn in turns),
    }


class Instructions(Dataset):
    """Records with their image opened: {"id", "image": PIL or None, "conversations"}.

    Args:
        annotations: LLaVA JSON file.
        images: Folder that the records' image paths start from.
    """

    def __init__(self, annotations: str | Path, images: str | Path):
        self.records = read_annotations(annotations)
        self.images = Path(images)
        if not self.images.is_dir():
            raise ValueError(f"data.images: no folder {self.images}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        image = self._open(record) if record["image"] else None
        return {"id": record["id"], "image": image, "conversations": record["conversations"]}

    def _open(self, record: dict) -> Image.Image:
        path = self.images / record["image"]
        try:
            return Image.open(path).convert("RGB")
        except FileNotFoundError:
            raise ValueError(f"record {record['id']!r}: image {path} is missing") from None
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"record {record['id']!r}: image {path} cannot be read: {error}") from None

    def lengths(self) -> list[int]:
        """Words of each record, negative where there is no image. Source: LLaVA train.py modality_lengths."""
        words, images = self.records["words"], self.records["image"]
        return [n if image else -n for n, image in zip(words, images, strict=True)]
