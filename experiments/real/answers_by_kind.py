"""Count the right answers of a checkpoint to questions from masks, by data set and kind of question.

    python -m experiments.real.answers_by_kind MODEL QUESTIONS.json IMAGES [--batch-size 8]

MODEL is a checkpoint of ours; QUESTIONS.json and IMAGES are those of `run.py --photos`. An answer is right if
it is the expected word. Each question is asked about two photos with different right answers, so that a blind model is
right in half. The interval is the normal one of a share of questions.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from llava_bidir.commands.generate import answer, load_with_processor
from llava_bidir.common.images import read_image

KINDS = {"Is there": "there", "Which is left": "left", "Which is in": "place"}
MAX_TOKENS = 4


def kind_of(question: str) -> str:
    """Return the kind of a question by its first words."""
    (kind,) = (kind for words, kind in KINDS.items() if question.startswith(words))
    return kind


def question_of(record: dict) -> str:
    """Return the question of a record without the mark of its picture."""
    return record["conversations"][0]["value"].removeprefix("<image>\n")


def row_of(record: dict) -> tuple[str, str]:
    """Return the data set and the kind of a record's question."""
    data = Path(record["image"]).parts[0]
    return data, kind_of(question_of(record))


def parse_arguments(description: str) -> argparse.Namespace:
    """Return the model, the file of questions, the folder of their photos, and how to ask."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def ask(args: argparse.Namespace, asked: list[tuple[dict, Image.Image]]) -> list[str]:
    """Return the model's answer to the question of each record about the photo beside it."""
    model, processor = load_with_processor(args.model, args.dtype)
    answers = []
    for start in tqdm(range(0, len(asked), args.batch_size), mininterval=5):
        batch = asked[start : start + args.batch_size]
        texts = [question_of(record) for record, _ in batch]
        photos = [[photo] for _, photo in batch]
        answers += answer(
            model, processor=processor, questions=texts, images=photos, max_new_tokens=MAX_TOKENS
        )
    return [words.strip() for words in answers]


def main() -> None:
    """Print a row for each data set and kind."""
    args = parse_arguments(__doc__)
    records = json.loads(args.questions.read_text())
    asked = [(record, read_image(args.images / record["image"])) for record in records]
    right = defaultdict(list)
    said = defaultdict(lambda: defaultdict(int))
    for record, words in zip(records, ask(args, asked), strict=True):
        row = row_of(record)
        right[row].append(words == record["conversations"][1]["value"])
        said[row][words] += 1
    print(
        f"{'data set':16}{'kind':8}{'questions':>10}{'right, %':>10}{'+/-':>6}  most frequent answer"
    )
    for (data, kind), answers in right.items():
        share = np.mean(answers)
        half_width = 196 * np.sqrt(share * (1 - share) / len(answers))
        word, times = max(said[data, kind].items(), key=lambda item: item[1])
        print(
            f"{data:16}{kind:8}{len(answers):10}{100 * share:10.1f}{half_width:6.1f}  "
            f"{word!r}, {times / len(answers):.0%}"
        )


if __name__ == "__main__":
    main()
