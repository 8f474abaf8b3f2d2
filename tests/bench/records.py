"""LLaVA's 665,298 records through opening, the sampler and an epoch of the loader.

    python tests/bench/records.py --records 665298

Prints JSON: seconds and memory of opening, then records/s of an epoch and what the processes hold in every tenth of
the time. Records are as long as those of the 665K mix: several turns, 94% with an image. The images are 64 small ones
shared by all, so that the time is that of the records. The epoch is that of `InstructionData`, with its step loader,
sampler and collation.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from measure import last_line
from memory import Watch, peak_mb
from PIL import Image
from transformers import CLIPVisionConfig

from llava_bidir.data.batch_samplers import BatchSampler, StepLoader, grouped_batches
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import SYSTEM
from llava_bidir.data.dataset import Instructions
from llava_bidir.model.build import build_processor
from llava_bidir.model.encoders import Encoder
from probes.worlds.tiny_models import train_tokenizer

PICTURES = 64
PICTURE_PX = (32, 24)
IMAGE_PX = 28
IMAGE_TOKENS = 576
TEXT_ONLY = 0.06  # share of the 665K mix
BATCH = 128
MICRO_BATCH = 16
WORDS = "the a man woman dog cat sky wall road is in on of with red green left right what where how many small".split()


def write_world(root: Path, records: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    py = random.Random(seed)
    for i in range(PICTURES):
        pixels = rng.integers(0, 255, (*PICTURE_PX[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    with open(root / "data.json", "w") as file:
        for i in range(records):
            file.write(("[" if i == 0 else ",\n") + json.dumps(_record(i, py)))
        file.write("]")
    CLIPVisionConfig(image_size=IMAGE_PX, patch_size=14).save_pretrained(root / "encoder")
    train_tokenizer([" ".join(WORDS)] * 3 + [SYSTEM, "USER: ASSISTANT:\n"], root / "llm")


def _record(index: int, py: random.Random) -> dict:
    picture = py.random() >= TEXT_ONLY
    turns = []
    for turn in range(py.choice((1, 1, 3, 5, 8, 12))):
        question = " ".join(py.choices(WORDS, k=py.randint(4, 14)))
        answer = " ".join(py.choices(WORDS, k=py.choice((1, 3, 10, 60, 120))))
        shown = "<image>\n" * (picture and turn == 0)
        turns.append({"from": "human", "value": shown + question})
        turns.append({"from": "gpt", "value": answer})
    record = {"id": f"{index:012d}", "conversations": turns}
    if picture:
        record["image"] = f"{index % PICTURES}.png"
    return record


def opening(root: Path, workers: int) -> dict:
    """The JSON into memory-mapped Arrow."""
    start = time.perf_counter()
    return {
        "peak_mb": peak_mb(lambda: open_all(root)),
        "seconds": round(time.perf_counter() - start, 1),
    }


def epoch(root: Path, workers: int) -> dict:
    """Every batch of an epoch, as the training step gets it."""
    instructions = open_all(root)
    processor = build_processor(Encoder("clip", str(root / "encoder")), str(root / "llm"))
    samples = 0
    loader = StepLoader(
        instructions,
        batch_sampler=BatchSampler(instructions.lengths(), BATCH, MICRO_BATCH, grouped_batches),
        collate_fn=Collate(processor, IMAGE_TOKENS, "vicuna_v1"),
        num_workers=workers,
        step_batches=BATCH // MICRO_BATCH,
        mean_over_ranks=lambda x: x,
    )
    with Watch() as watch:
        for batch in loader:
            samples += len(batch["ids"])
    return watch.facts(samples) | {"samples": samples}


PHASES = {"opening": opening, "epoch": epoch}


def open_all(root: Path) -> Instructions:
    return Instructions(root / "data.json", root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=665_298)
    parser.add_argument("--workers", type=int, default=2, help="processes of the loader")
    parser.add_argument("--phase", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(PHASES[args.phase[0]](Path(args.phase[1]), args.workers)))
        return
    with TemporaryDirectory() as folder:
        write_world(Path(folder), args.records)
        size = (Path(folder) / "data.json").stat().st_size
        measurements = {"records": args.records, "json_mb": round(size / 1e6, 1)}
        words = [sys.executable, __file__, "--workers", args.workers, "--phase"]
        for phase in PHASES:  # each in a process of its own, or one would hide what another holds
            line = last_line(
                [*words, phase, folder],
                HF_DATASETS_CACHE=f"{folder}/cache",
                TOKENIZERS_PARALLELISM="false",
            )
            measurements[phase] = json.loads(line)
    print(json.dumps(measurements, indent=1))


if __name__ == "__main__":
    main()
