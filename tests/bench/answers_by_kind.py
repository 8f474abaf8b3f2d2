"""Count the right answers of a checkpoint to questions from masks, by data set and kind of question.

    python tests/bench/answers_by_kind.py MODEL QUESTIONS.json IMAGES [--batch-size 8]

MODEL is a checkpoint of ours; QUESTIONS.json and IMAGES are those of `llava-bidir real --photos`. An answer is right if
it is the expected word. Each question is asked about two photos with different right answers, so that a blind model is
right in half. The interval is the normal one of a share of questions.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llava_bidir.commands.generate import answer, load
from llava_bidir.data.image_folder import read_image

KINDS = {
    "Is there": "there",
    "Which is left": "left",
    "Which is in": "place",
}
MAX_TOKENS = 4


def kind_of(question: str) -> str:
    """Return the kind of a question by its first words."""
    (kind,) = (kind for words, kind in KINDS.items() if question.startswith(words))
    return kind


def main() -> None:
    """Print a row for each data set and kind."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    model, processor = load(args.model, args.dtype)
    records = json.loads(args.questions.read_text())
    right = defaultdict(list)
    said = defaultdict(lambda: defaultdict(int))
    for start in tqdm(range(0, len(records), args.batch_size), mininterval=5):
        batch = records[start : start + args.batch_size]
        texts = []
        for record in batch:
            texts.append(record["conversations"][0]["value"].removeprefix("<image>\n"))
        images = [[read_image(args.images / record["image"])] for record in batch]
        answers = answer(model, processor, texts, images, MAX_TOKENS)
        for record, text, words in zip(batch, texts, answers, strict=True):
            row = (Path(record["image"]).parts[0], kind_of(text))
            right[row].append(words.strip() == record["conversations"][1]["value"])
            said[row][words.strip()] += 1
    print(
        f"{'data set':16}{'kind':8}{'questions':>10}{'right, %':>10}{'+/-':>6}  most frequent answer"
    )
    for row, answers in right.items():
        share = np.mean(answers)
        half_width = 196 * np.sqrt(share * (1 - share) / len(answers))
        word, times = max(said[row].items(), key=lambda item: item[1])
        print(
            f"{row[0]:16}{row[1]:8}{len(answers):10}{100 * share:10.1f}{half_width:6.1f}  "
            f"{word!r}, {times / len(answers):.0%}"
        )


if __name__ == "__main__":
    main()
