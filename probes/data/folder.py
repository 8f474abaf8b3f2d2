"""A folder of images and PNG masks, the layout of ADE20K:

    ROOT/images/{training,validation}/NAME.jpg (or .png)
    ROOT/annotations/{training,validation}/NAME.png       8-bit, one class index a pixel
    ROOT/classes.json                                     {"classes": ["wall", ...], "ignore_index": 255}

With `"reduce_zero_label": true` in classes.json, 0 stands for "no class" and the classes count from 1, as in ADE20K's
own files. `"palette": [[r, g, b], ...]` gives the maps their colours.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

IGNORE_INDEX = 255
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class FolderDataset(Dataset):
    """Images with their masks: {"name": str, "image": PIL RGB, "target": uint8[H, W], 255 where ignored}.

    Args:
        root: As laid out above.
        split: "training" or "validation".

    Raises:
        ValueError: A part is missing, an image has no mask or the other way round, or, on reading, a mask is not what
            is described above.
    """

    def __init__(self, root: str | Path, split: str):
        self.root, self.split = Path(root), split
        facts = _read_facts(self.root / "classes.json")
        self.classes: list[str] = facts["classes"]
        self.palette: list[list[int]] | None = facts.get("palette")
        self._classes_of = _lookup(len(self.classes), facts.get("ignore_index", IGNORE_INDEX), facts)
        images = _files(self.root / "images" / split, IMAGE_SUFFIXES)
        masks = _files(self.root / "annotations" / split, (".png",))
        _same_names(images, masks, self.root, split)
        self.names = sorted(images)
        self._images, self._masks = images, masks

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        image = _open(self._images[name]).convert("RGB")
        target = self._read_mask(self._masks[name])
        if target.shape != image.size[::-1]:
            raise ValueError(
                f"{self._masks[name]} is {target.shape[1]} x {target.shape[0]} px, its image {self._images[name]} "
                f"{image.size[0]} x {image.size[1]} px; they must be the same"
            )
        return {"name": name, "image": image, "target": target}

    def _read_mask(self, path: Path) -> np.ndarray:
        mask = _open(path)
        if mask.mode not in ("L", "P"):
            raise ValueError(f"{path} has mode {mask.mode!r}; a mask has one 8-bit class index a pixel (mode L or P)")
        raw = np.asarray(mask)
        target = self._classes_of[raw]
        if (target < 0).any():
            raise ValueError(
                f"{path} has label {raw[target < 0][0]}, but classes.json names {len(self.classes)} classes; name the "
                "others there, or set its ignore_index"
            )
        return target.astype(np.uint8)


def _read_facts(path: Path) -> dict:
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f'{path} is missing; it names the classes: {{"classes": ["wall", ...]}}') from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("classes"), list) or not facts["classes"]:
        raise ValueError(f"{path} needs a list of names under 'classes'")
    return facts


def _lookup(classes: int, ignore_index: int, facts: dict) -> np.ndarray:
    """int16[256]: raw label -> class, 255 where ignored, -1 where it must not occur."""
    table = np.full(256, -1, np.int16)
    first = 1 if facts.get("reduce_zero_label", False) else 0
    table[first : first + classes] = np.arange(classes)
    table[ignore_index] = IGNORE_INDEX
    if first:
        table[0] = IGNORE_INDEX
    return table


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; expected ROOT/images/SPLIT and ROOT/annotations/SPLIT under data.root")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes}


def _same_names(images: dict, masks: dict, root: Path, split: str) -> None:
    for names, other, what in ((images, masks, "mask"), (masks, images, "image")):
        lonely = sorted(set(names) - set(other))
        if lonely:
            raise ValueError(f"{root}, {split}: {len(lonely)} files have no {what}, {names[lonely[0]]} for one")
    if not images:
        raise ValueError(f"{root}, {split}: no images ({', '.join(IMAGE_SUFFIXES)})")


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    return image
