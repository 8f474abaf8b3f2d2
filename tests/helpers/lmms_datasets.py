"""Small datasets in the format of each benchmark on the hub, in folders of the same name, for offline tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

ORGANISATION = "lmms-lab-encoder"
WORDS = ["sky", "wall", "road"]


def write(root: Path, items: int = 6) -> Path:
    """Write all nine under `root`, with an even number of records each."""
    for name, (config, split, records) in DATASETS.items():
        write_one(root / ORGANISATION / name.partition(":")[0], config, split, list(records(items)))
    return root


def write_one(
    folder: Path,
    config: str,
    split: str,
    records: list[dict],
) -> None:
    """Write a parquet file, and the README.md that names its configuration and split."""
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(records).to_parquet(folder / f"{config}.parquet")
    readme = folder / "README.md"
    head = readme.read_text().removesuffix("---\n") if readme.exists() else "---\nconfigs:\n"
    entry = (
        f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {config}.parquet\n"
    )
    readme.write_text(f"{head}{entry}---\n")


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (10 + seed % 3, 14, 3), np.uint8))


def gqa_images(items: int) -> Iterator[dict]:
    for i in range(items // 2):
        yield {"id": f"n{i}", "image": picture(i)}


def gqa(items: int) -> Iterator[dict]:
    for i in range(items):
        yield {
            "id": f"q{i}",
            "imageId": f"n{i // 2}",
            "question": "name the sky?",
            "answer": WORDS[i % 3],
        }


def mmbench(items: int) -> Iterator[dict]:
    """Yield two orders of the options of each question."""
    for i in range(items):
        question, turned = divmod(i, 2)
        options = dict(zip("ABCD", [*WORDS[turned:], *WORDS[:turned], "nan"], strict=True))
        yield {
            "index": question + 1_000_000 * turned,
            "question": "name it",
            "hint": "nan",
            **options,
            "answer": "CB"[turned],
            "category": "c",
            "L2-category": "l",
            "source": "s",
            "split": "dev",
            "comment": "nan",
            "image": picture(question),
        }


def mme(items: int) -> Iterator[dict]:
    """Alternate between perception and cognition by image."""
    for i in range(items):
        category = ("existence", "code_reasoning")[i // 2 % 2]
        question = ("Is it sky?", "Is it wall?")[i % 2]
        yield {
            "question_id": f"{category}/{i // 2}.png",
            "category": category,
            "image": picture(i // 2),
            "question": f"{question} Please answer yes or no.",
            "answer": ("Yes", "No")[i % 2],
        }


def mmmu(items: int) -> Iterator[dict]:
    """Yield multiple choice with one or two images, and open questions."""
    for i in range(items):
        kind = "open" if i % 3 == 2 else "multiple-choice"
        images = {f"image_{n}": picture(i + n) if n <= 1 + i % 2 else None for n in range(1, 8)}
        yield {
            "id": f"validation_Art_{i}",
            "question": "name <image 1>" + " and <image 2>" * (i % 2),
            "options": str(WORDS if kind != "open" else []),
            "answer": "A" if kind != "open" else "sky",
            "question_type": kind,
            **images,
        }


def pope(items: int) -> Iterator[dict]:
    for i in range(items):
        yield {
            "id": str(i),
            "question_id": str(i),
            "question": f"Is there a {WORDS[i % 3]}?",
            "image": picture(i // 2),
            "answer": ("yes", "no")[i % 2],
            "image_source": f"COCO_{i // 2}",
            "category": "random",
        }


def scienceqa(items: int) -> Iterator[dict]:
    for i in range(items):
        hint = "the sky" * (i % 2)
        yield {
            "image": picture(i),
            "question": "name it",
            "choices": WORDS,
            "answer": i % 3,
            "hint": hint,
        }


def textvqa(items: int) -> Iterator[dict]:
    for i in range(items):
        yield {
            "image_id": f"t{i // 2}",
            "question_id": i,
            "question": "name the road",
            "image": picture(i // 2),
            "ocr_tokens": ["sky", "wall"],
            "answers": [WORDS[i % 3]] * 3 + ["rest"] * 7,
        }


def vizwiz(items: int) -> Iterator[dict]:
    for i in range(items):
        yield {
            "question_id": f"v{i}",
            "image": picture(i),
            "question": "what is this",
            "answers": [WORDS[i % 3]] * 10,
        }


DATASETS: dict[
    str, tuple[str, str, Callable[[int], Iterator[dict]]]
] = {  # configuration, split, records
    "GQA:images": ("testdev_balanced_images", "testdev", gqa_images),
    "GQA": ("testdev_balanced_instructions", "testdev", gqa),
    "MMBench": ("en", "dev", mmbench),
    "MME": ("default", "test", mme),
    "MMMU": ("default", "validation", mmmu),
    "POPE": ("default", "test", pope),
    "ScienceQA": ("ScienceQA-IMG", "test", scienceqa),
    "textvqa": ("default", "validation", textvqa),
    "VizWiz-VQA": ("default", "val", vizwiz),
}
