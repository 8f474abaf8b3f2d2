"""Small datasets in the format of each benchmark on the hub, in folders of the same name, for offline tests."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

ORGANISATION = "lmms-lab-encoder"
WORDS = ["sky", "wall", "road"]


def write(root: Path) -> Path:
    """Write all nine under `root`, with six records each."""
    folder = root / ORGANISATION
    images = [{"id": f"n{i}", "image": picture(i)} for i in range(3)]
    write_one(folder / "GQA", config="testdev_balanced_images", split="testdev", records=images)
    for name, (config, split, record) in DATASETS.items():
        write_one(folder / name, config=config, split=split, records=[record(i) for i in range(6)])
    return root


def write_one(folder: Path, config: str, split: str, records: list[dict]) -> None:
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


def mmbench(i: int) -> dict:
    """Return each question in two orders of its options."""
    question, turned = divmod(i, 2)
    options = dict(zip("ABCD", [*WORDS[turned:], *WORDS[:turned], "nan"], strict=True))
    return {
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


def mme(i: int) -> dict:
    """Alternate between perception and cognition by image."""
    category = ("existence", "code_reasoning")[i // 2 % 2]
    return {
        "question_id": f"{category}/{i // 2}.png",
        "category": category,
        "image": picture(i // 2),
        "question": f"Is it {WORDS[i % 2]}? Please answer yes or no.",
        "answer": ("Yes", "No")[i % 2],
    }


def mmmu(i: int) -> dict:
    """Return multiple choice with one or two images, and open questions."""
    is_open = i % 3 == 2
    images = {f"image_{n}": picture(i + n) if n <= 1 + i % 2 else None for n in range(1, 8)}
    return {
        "id": f"validation_Art_{i}",
        "question": "name <image 1>" + " and <image 2>" * (i % 2),
        "options": str([] if is_open else WORDS),
        "answer": "sky" if is_open else "A",
        "question_type": "open" if is_open else "multiple-choice",
        **images,
    }


def gqa(i: int) -> dict:
    return {
        "id": f"q{i}",
        "imageId": f"n{i // 2}",
        "question": "name the sky?",
        "answer": WORDS[i % 3],
    }


def pope(i: int) -> dict:
    return {
        "id": str(i),
        "question_id": str(i),
        "question": f"Is there a {WORDS[i % 3]}?",
        "image": picture(i // 2),
        "answer": ("yes", "no")[i % 2],
        "image_source": f"COCO_{i // 2}",
        "category": "random",
    }


def scienceqa(i: int) -> dict:
    return {
        "image": picture(i),
        "question": "name it",
        "choices": WORDS,
        "answer": i % 3,
        "hint": "the sky" * (i % 2),
    }


def textvqa(i: int) -> dict:
    return {
        "image_id": f"t{i // 2}",
        "question_id": i,
        "question": "name the road",
        "image": picture(i // 2),
        "ocr_tokens": ["sky", "wall"],
        "answers": [WORDS[i % 3]] * 3 + ["rest"] * 7,
    }


def vizwiz(i: int) -> dict:
    return {
        "question_id": f"v{i}",
        "image": picture(i),
        "question": "what is this",
        "answers": [WORDS[i % 3]] * 10,
    }


DATASETS = {  # configuration, split, record by number
    "GQA": ("testdev_balanced_instructions", "testdev", gqa),
    "MMBench": ("en", "dev", mmbench),
    "MME": ("default", "test", mme),
    "MMMU": ("default", "validation", mmmu),
    "POPE": ("default", "test", pope),
    "ScienceQA": ("ScienceQA-IMG", "test", scienceqa),
    "textvqa": ("default", "validation", textvqa),
    "VizWiz-VQA": ("default", "val", vizwiz),
}
