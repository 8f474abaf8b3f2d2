"""Photos and captions of one's own as the data of `run.py`.

OUT/photos/NAME, OUT/photos/captions    links to the data sets and to the folder of the captions' photos
OUT/photos/captions.json                stage 1: one caption of each photo
OUT/photos/dialogues.json               stage 2: questions from the training masks, and as many other captions
OUT/photos/questions.json               questions from the validation masks, of all data sets
OUT/photos/NAME.json                    the same of one data set, for `probes routes --images OUT/photos`
OUT/photos/sources.json                 hashes of what they were made from
"""

import random
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json, sha256, write_files
from llava_bidir.data.dataset import read_records
from probes.config import QuestionsOptions
from probes.worlds.questions import build_records

CAPTIONS = "captions"  # name of the link
FILES = (CAPTIONS, "dialogues", "questions", "sources")


def write_photos(
    out: Path,
    folders: list[Path],
    captions: Path | None,
    caption_images: Path | None,
    *,
    seed: int,
    held_out: int,
) -> None:
    """Write the records of both stages, and links to their photos.

    Args:
        out: Folder to write.
        folders: Folder data sets.
        captions: LLaVA's JSON with captions; None: captions that list the classes of masks.
        caption_images: Folder of their photos; None: that of `captions`.
        seed: Seed of all random choices.
        held_out: Questions about the validation photos of each data set.

    Raises:
        UserError: A folder is no data set, two have the same name, or no record has a photo and a caption.
    """
    check_paths(folders, captions, caption_images)
    out.mkdir(parents=True, exist_ok=True)
    names = [folder.resolve().name for folder in folders]
    if len({*FILES, *names}) < len(FILES) + len(names):
        raise UserError(
            f"--photos has folders named {', '.join(names)}; expected different names, and none "
            f"of them {', '.join(FILES)}"
        )
    of_masks = []
    dialogues = []
    questions = {}
    for folder, name in zip(folders, names, strict=True):
        _link(out / name, folder)
        asked = QuestionsOptions(data=folder, out=out, seed=seed, held_out=held_out)
        records = build_records(asked, f"{name}/")
        of_masks += records["captions"]
        dialogues += records["dialogues"]
        questions[name] = records["questions"]
    first = of_masks
    others = of_masks
    if captions is not None:
        _link(out / CAPTIONS, caption_images or captions.parent)
        first, others = choose_captions(read_captions(captions), seed)
    mixed = dialogues + others[: len(dialogues)]
    by_file: dict[Path, Any] = {out / f"{name}.json": rows for name, rows in questions.items()}
    by_file[out / "captions.json"] = first
    by_file[out / "dialogues.json"] = mixed
    by_file[out / "sources.json"] = describe_sources(folders, captions)
    by_file[out / "questions.json"] = [row for rows in questions.values() for row in rows]
    write_files(by_file)


def check_paths(folders: list[Path], captions: Path | None, caption_images: Path | None) -> None:
    """Raise a UserError that names a folder or the file of captions if it is not there."""
    for folder in [*folders, *filter(None, [caption_images])]:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; expected a folder of photos")
    if captions and not captions.is_file():
        raise UserError(f"--captions {captions} is not a file; expected LLaVA's JSON")


def describe_sources(folders: list[Path], captions: Path | None) -> dict[str, str | None]:
    """Return what records are made from, as hashes: images and masks of each data set, and the captions."""
    from probes.data.registry import identity_of_splits, open_dataset

    hashes: dict[str, str | None] = {"captions": captions and sha256(captions)}
    for folder in folders:
        for split in ("training", "validation"):
            dataset = open_dataset("folder", str(folder), split)
            for part, value in identity_of_splits({split: dataset}).items():
                hashes[f"{folder.resolve().name}/{part}"] = value
    return hashes


def check_sources(out: Path, folders: list[Path], captions: Path | None) -> None:
    """Raise a UserError if the records in `out` were made from other photos, masks or captions than are there now."""
    before = read_json(out / "sources.json")
    now = describe_sources(folders, captions)
    if changed := sorted(name for name in before | now if before.get(name) != now.get(name)):
        raise UserError(
            f"{', '.join(changed)} have changed since {out} was made; restore them, or delete {out} to train again on "
            "what is there, or choose another folder (--out)"
        )


def read_captions(file: Path) -> list[dict[str, Any]]:
    """Return the records with a photo, whose paths begin with the name of the link.

    Raises:
        UserError: There is none.
    """
    records = [
        record | {"image": f"{CAPTIONS}/{record['image']}"}
        for record in read_records(file)
        if isinstance(record, dict) and record.get("image")
    ]
    if not records:
        raise UserError(f"--captions {file} has no record with a photo under 'image'")
    return records


def choose_captions(
    records: list[dict[str, Any]], seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return one record of each photo, and another one of each photo that has several, in random order."""
    rng = random.Random(seed)
    by_photo: dict[str, list[dict[str, Any]]] = {}
    for record in rng.sample(records, len(records)):
        by_photo.setdefault(record["image"], []).append(record)
    first = [of_photo[0] for of_photo in by_photo.values()]
    others = [of_photo[-1] for of_photo in by_photo.values()]
    return first, others


def _link(link: Path, folder: Path) -> None:
    """Link to a folder."""
    link.unlink(missing_ok=True)
    link.symlink_to(folder.resolve(), target_is_directory=True)
