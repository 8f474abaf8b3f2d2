"""Paintings as ordinary data folders (probes/data/folder.py), below one folder that the user names at the start.

A patch that nobody painted is 255 in the mask, "unknown". Pictures have the size of the lab's previews.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava_bidir.common.atomic_io import atomic_directory, write_files
from llava_bidir.common.errors import UserError
from probes.data.base import IGNORE_INDEX
from probes.data.folder import FolderDataset
from probes.models.teach import BACKGROUND
from probes.ops.geometry import Geometry
from probes.ops.pixel_counts import patch_labels

from .photos import Photo
from .requests import MAX_CONCEPTS, MAX_PAINTED, Painting

EVERY = 3  # one photo in three is for validation


def list_folders(root: Path) -> list[str]:
    """Return the names of the data folders, the latest one first."""
    folders = [file.parent for file in root.glob("*/classes.json")]
    return [folder.name for folder in sorted(folders, key=lambda folder: -folder.stat().st_mtime)]


def write_folder(
    root: Path,
    painting: Painting,
    photos: Sequence[Photo],
    geometry: Geometry,
    palette: list,
) -> Path:
    """Write a painting into a new folder below `root` and return its path.

    Every third photo is for validation, so that two photos or more are both trained on and scored.

    Raises:
        UserError: The folder cannot be written.
    """
    numbers = [int(name) for name in list_folders(root) if name.isdigit()]
    folder = root / f"{max(numbers, default=0) + 1:03d}"
    names = [*painting.concepts, *[BACKGROUND] * painting.rest]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(folder, marker="classes.json") as partial:
        for i, (photo, painted) in enumerate(zip(photos, painting.photos, strict=True)):
            split = "validation" if i % EVERY == 1 else "training"
            # the last one: no patch
            labels = np.full(geometry.grid[0] * geometry.grid[1] + 1, IGNORE_INDEX, np.uint8)
            if painting.rest:
                labels[:-1] = len(painting.concepts)
            for k, patches in enumerate(painted.patches):
                labels[list(patches)] = k
            width, height = photo.preview.size
            rows, columns = geometry.view((height, width)).token_of_pixel(
                geometry.grid, (height, width)
            )
            patch = rows[:, None] * geometry.grid[1] + columns
            is_padding = (rows[:, None] < 0) | (columns < 0)
            patch = torch.where(is_padding, -1, patch).numpy()
            for kind, image in (
                ("images", photo.preview),
                ("annotations", Image.fromarray(labels[patch])),
            ):
                (partial / kind / split).mkdir(parents=True, exist_ok=True)
                image.save(partial / kind / split / f"{i + 1:02d}.png")
        classes = {
            "classes": names,
            "ignore_index": IGNORE_INDEX,
            "palette": palette[: len(names)],
        }
        write_files({partial / "classes.json": classes})
    return folder


def read_folder(
    root: Path, name: str, geometry: Geometry
) -> tuple[list[str], list[tuple[Path, list[list[int]]]]]:
    """Return the concepts of a folder, and each picture's file with the patches of each concept.

    A patch belongs to the concept of most of its labelled pixels.

    Raises:
        UserError: The folder is unknown, or not one that the lab can show.
    """
    if name not in list_folders(root):
        raise UserError(
            f"{root} has no data folder {name!r}; it has {', '.join(list_folders(root)) or 'none'}"
        )
    splits = [
        split for split in ("training", "validation") if (root / name / "images" / split).is_dir()
    ]
    datasets = [FolderDataset(root / name, split) for split in splits]
    if not datasets or (count := sum(map(len, datasets))) > MAX_PAINTED:
        raise UserError(
            f"{root / name} has {count if datasets else 'no'} pictures; expected 1 to {MAX_PAINTED}"
        )
    if len(names := datasets[0].classes) > MAX_CONCEPTS:
        raise UserError(f"{root / name} has {len(names)} classes; expected at most {MAX_CONCEPTS}")
    painted = []
    for dataset in datasets:
        for i in range(len(dataset)):
            target = torch.from_numpy(dataset[i]["target"])[None]
            labels = patch_labels(
                target, len(names), geometry.grid, geometry.view(tuple(target.shape[1:]))
            )[0]
            patches = [(labels == k).nonzero().flatten().tolist() for k in range(len(names))]
            painted.append((Path(dataset.files(i)[0]), patches))
    return names, painted
