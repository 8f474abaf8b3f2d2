"""The data path beside a plain list of dicts as LLaVA's: samples/s, memory of each worker, start-up of the sampler.

Both sides read the same file in one run. The list is what LLaVA's train.py does: the whole JSON as Python objects in
each process, images padded and processed one by one, the conversation tokenised as a whole and once more in rounds.
"""

import gc
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig

from llava_bidir.data.batch_samplers import BatchSampler
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import SYSTEM
from llava_bidir.data.instruction_dataset import Instructions
from llava_bidir.model.build import build_processor
from llava_bidir.model.encoders import Encoder
from llava_bidir.toy_world.tiny_models import train_tokenizer

PICTURES, PICTURE_PX, IMAGE_PX = 64, (640, 480), 336
TEXT_ONLY = 0.06  # share of the 665K mix
WORDS = "the a man woman dog cat sky wall road is in on of with red green left right what where how many small".split()
WORKERS = 2


def write_world(root: Path, records: int, seed: int = 0) -> Path:
    """Photo-sized JPEGs and a JSON with as many turns and words as LLaVA's 665K mix has about, as far as known."""
    rng, py = np.random.default_rng(seed), random.Random(seed)
    for i in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).resize(
            PICTURE_PX, Image.Resampling.BICUBIC
        )
        noise = rng.normal(0, 12, (PICTURE_PX[1], PICTURE_PX[0], 3))  # as much detail as a photo, some 90 KB
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(root / f"{i}.jpg", quality=90)
    with open(root / "data.json", "w") as file:
        for i in range(records):
            file.write(("[" if i == 0 else ",\n") + json.dumps(_record(i, py)))
        file.write("]")
    return root


def _record(index: int, py: random.Random) -> dict:
    picture = py.random() >= TEXT_ONLY
    turns = []
    for turn in range(py.choice((1, 1, 3, 5, 8))):
        question = " ".join(py.choices(WORDS, k=py.randint(4, 14)))
        turns.append({"from": "human", "value": ("<image>\n" if picture and turn == 0 else "") + question})
        turns.append({"from": "gpt", "value": " ".join(py.choices(WORDS, k=py.choice((1, 3, 10, 60))))})
    record = {"id": f"{index:09d}", "conversations": turns}
    return record | {"image": f"{index % PICTURES}.jpg"} if picture else record


class ListOfDicts(Dataset):
    """LLaVA's LazySupervisedDataset, from its description."""

    def __init__(self, root: Path, tokenizer):
        self.records, self.root, self.tokenizer = json.loads((root / "data.json").read_text()), root, tokenizer
        size = {"shortest_edge": IMAGE_PX}
        self.processor = CLIPImageProcessorPil(size=size, crop_size={"height": IMAGE_PX, "width": IMAGE_PX})

    def __len__(self) -> int:
        return len(self.records)

    def lengths(self) -> list[int]:
        words = (sum(len(turn["value"].split()) for turn in r["conversations"]) for r in self.records)
        return [n if "image" in r else -n for n, r in zip(words, self.records, strict=True)]

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        text = SYSTEM + " "
        for question, answer in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
            text += f"USER: {question['value']} ASSISTANT: {answer['value']}</s>"
        ids = [token for chunk in text.split("<image>") for token in self.tokenizer(chunk).input_ids]
        for part in text.split("</s>"):  # the rounds, each tokenised as a whole and up to its answer
            self.tokenizer(part)
            self.tokenizer(part.split(" ASSISTANT: ")[0])
        sample = {"ids": ids}
        if "image" in record:
            image = Image.open(self.root / record["image"]).convert("RGB")
            square = Image.new("RGB", (max(image.size),) * 2, tuple(int(x * 255) for x in self.processor.image_mean))
            square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
            sample["pixels"] = self.processor(square, return_tensors="pt")["pixel_values"][0]
        return sample


def llava_batches(lengths: list[int], batch: int, generator: torch.Generator) -> list[int]:
    """get_modality_length_grouped_indices as LLaVA does it, on lists, for eight devices."""
    megabatches, rest = [], []
    for text_only in (False, True):
        indices = [i for i, n in enumerate(lengths) if (n < 0) == text_only]
        order = [indices[i] for i in torch.randperm(len(indices), generator=generator)]
        chunks = [sorted(order[i : i + batch], key=lambda i: -abs(lengths[i])) for i in range(0, len(order), batch)]
        if chunks and len(chunks[-1]) < batch:
            rest += chunks.pop()
        megabatches += [_split_evenly(chunk, lengths, 8) for chunk in chunks]
    shuffled = [megabatches[i] for i in torch.randperm(len(megabatches), generator=generator)]
    return [i for chunk in [*shuffled, sorted(rest)] for i in chunk]


def _split_evenly(indices: list[int], lengths: list[int], count: int) -> list[int]:
    chunks, totals, size = [[] for _ in range(count)], [0.0] * count, len(indices) // count
    for index in indices:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += abs(lengths[index])
        if len(chunks[shortest]) == size:
            totals[shortest] = float("inf")
    return [i for chunk in chunks for i in chunk]


def memory_of(dataset: Dataset) -> dict[str, float]:
    """MB that one of several workers holds after it has read all records, without images.

    private: what it alone has and cannot give back. Workers are forked, so that what one writes to is copied for it,
    and reading a Python object writes to its reference count. pss: that, and its share of what it has in common with
    the others, mapped files included.
    """
    gc.collect()
    loader = DataLoader(_Touch(dataset), batch_size=64, num_workers=WORKERS, collate_fn=lambda found: found)
    found = [memory for batch in loader for memory in batch if memory]
    return {kind: max(memory[kind] for memory in found) for kind in ("private", "pss")}


class _Touch(Dataset):
    """Reads a record and now and then says how much memory this worker has."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.order = dataset, np.random.default_rng(0).permutation(len(dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, float] | None:
        record = self.dataset.records[int(self.order[index])]
        sum(len(turn["value"]) for turn in record["conversations"])
        return memory_mb() if index % 1024 == 1023 or len(self) - index < 128 else None


def memory_mb() -> dict[str, float]:
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    kb = {name.rstrip(":"): int(value) for name, value, *_ in lines}
    return {"private": kb["Private_Dirty"] / 1024, "pss": kb["Pss"] / 1024}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cpu_seconds(function: Callable[[], object]) -> float:
    """Of this process: on a busy machine too, what one core would need."""
    start = time.process_time()
    function()
    return time.process_time() - start


def ratio(name: str, unit: str, ours: float, other: float) -> dict:
    return {"name": name, f"ours_{unit}": ours, f"other_{unit}": other, "ratio": [other / ours] * 3}


def bench_data(records: int) -> list[dict]:
    """Entries as `bench.py` prints them, for a JSON of so many records; LLaVA's mix has 665,298."""
    with TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        return _bench_data(Path(folder), records)


def _bench_data(root: Path, records: int, samples: int = 128) -> list[dict]:
    write_world(root, records)
    CLIPVisionConfig(image_size=IMAGE_PX, patch_size=14).save_pretrained(root / "encoder")
    train_tokenizer([" ".join(WORDS)] * 3 + [SYSTEM, "USER: ASSISTANT:\n"], root / "llm")
    found = []

    build = time.perf_counter()
    ours = Instructions(root / "data.json", root)
    built = time.perf_counter() - build
    again = seconds(lambda: Instructions(root / "data.json", root))
    memory = memory_of(ours)

    start = time.perf_counter()
    listed = ListOfDicts(root, AutoTokenizer.from_pretrained(root / "llm"))
    opening = time.perf_counter() - start
    entry = ratio(f"opening {records:,} records, list of dicts over ours (cached)", "s", again, opening)
    found.append(entry | {"ours_first_time_s": built})
    other_memory = memory_of(listed)
    for kind, name in (
        ("private", "memory that a worker has for itself"),
        ("pss", "memory of a worker, shared included"),
    ):
        found.append(ratio(f"{name}, {records:,} records read", "mb", memory[kind], other_memory[kind]))

    collate = Collate(build_processor(Encoder("clip", str(root / "encoder")), str(root / "llm")), 576, "vicuna_v1")
    order = np.random.default_rng(1).permutation(records)[:samples].tolist()
    chunks = [order[i : i + 16] for i in range(0, samples, 16)]
    sides = (lambda rows: collate([ours[i] for i in rows])), (lambda rows: [listed[i] for i in rows])
    spent = [[cpu_seconds(lambda s=side, r=rows: s(r)) for side in sides] for rows in chunks][1:]
    mine, theirs = np.array(spent).T / len(chunks[0])
    ratios = np.quantile(theirs / mine, (0, 0.5, 1)).tolist()
    entry = ratio("a sample with a 640 x 480 JPEG, seconds of a core", "s", float(mine.mean()), float(theirs.mean()))
    rates = {"ours_samples_per_s": 1 / float(mine.mean()), "other_samples_per_s": 1 / float(theirs.mean())}
    found.append(entry | rates | {"ratio": ratios})

    def start_up() -> None:
        sampler = BatchSampler(ours.lengths(), 128, 16, grouped=True, world_size=8)
        assert len(sampler) == math.ceil(records / 128)
        next(iter(sampler))

    mine = seconds(start_up)
    theirs = seconds(lambda: llava_batches(listed.lengths(), 128, torch.Generator().manual_seed(0)))
    return [*found, ratio(f"grouped sampler, start to first batch of {records:,} records", "s", mine, theirs)]
