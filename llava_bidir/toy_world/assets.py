"""`llava-bidir demo-assets`: draws the toy world and trains its tiny encoder and LLM, all written to disk.

OUT/segmentation/{images,annotations}/{training,validation}/*.png, classes.json    ADE20K's folder layout
OUT/llava/*.png                                                                    images of the conversations
OUT/captions.json, dialogues.json, questions.json                                  LLaVA's JSON
OUT/encoder/, OUT/llm/                                                             Hugging Face directories
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from llava_bidir.common.atomic_io import atomic_directory

from . import tiny_models
from .canvas import CLASSES, PALETTE
from .dialogues import View, as_text, dialogue, misread, show
from .scenes import Scene, draw_scene

PICTURES = {"llava": 3000, "training": 1000, "validation": 600}
CAPTIONS, DIALOGUES, QUESTIONS = 1920, 4480, 400
TEXT_ONLY = 0.05  # share of the dialogues that have their picture in words, as LLaVA's mix has text-only ones
ENCODER_STEPS, LLM_STEPS = 1400, 240  # about as long, side by side
EVIDENCE = 0.1  # mean of the one local hint that tells look-alikes apart, in units of its own spread
CHUNK = 100


def demo_assets(out: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Writes the toy world: scenes with masks, conversations, a tiny encoder and a tiny LLM.

    Args:
        out: Folder; replaced as a whole if it is an earlier world.
        seed: Decides everything that is drawn.
        scale: Share of the full demo's pictures, conversations and training steps, for quick trials.
    """
    sized = {name: max(16, round(n * scale)) for name, n in PICTURES.items()}
    # spawned, not forked: torch's threads do not survive a fork
    workers = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), _one_thread)
    with atomic_directory(out, marker="questions.json") as partial, workers as pool:
        scenes = _draw(pool, partial, sized, seed)
        views = {split: [View.of(scene) for scene in found] for split, found in scenes.items()}
        jobs = [
            pool.submit(_train_encoder, scenes["llava"], partial / "encoder", round(ENCODER_STEPS * scale), seed),
            pool.submit(_train_llm, views["llava"], partial / "llm", round(LLM_STEPS * scale), seed),
        ]
        _write_classes(partial / "segmentation/classes.json")
        _write_conversations(partial, views, scale, seed)
        for job in jobs:
            job.result()
    print(f"{out}: " + ", ".join(f"{n} {split} pictures" for split, n in sized.items()))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _draw(pool: ProcessPoolExecutor, out: Path, sizes: dict[str, int], seed: int) -> dict[str, list[Scene]]:
    """Draws and writes all splits, in chunks with a generator each, so that the pool's size changes nothing."""
    jobs = {
        (split, start): pool.submit(_draw_chunk, out, split, start, min(CHUNK, n - start), seed)
        for split, n in sizes.items()
        for start in range(0, n, CHUNK)
    }
    scenes = {split: [] for split in sizes}
    for (split, _), job in tqdm(jobs.items(), desc="drawing scenes", mininterval=5):
        scenes[split] += job.result()
    return scenes


def _draw_chunk(out: Path, split: str, start: int, count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng([seed, list(PICTURES).index(split), start])
    scenes = [draw_scene(rng, EVIDENCE) for _ in range(count)]
    for i, scene in enumerate(scenes, start):
        _save(scene.image, out / _image_path(split, i))
        if split != "llava":
            _save(scene.mask, out / "segmentation/annotations" / split / f"{i:05d}.png")
    return scenes


def _image_path(split: str, index: int) -> str:
    return f"llava/{index:05d}.png" if split == "llava" else f"segmentation/images/{split}/{index:05d}.png"


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)


def _write_classes(path: Path) -> None:
    facts = {"classes": CLASSES, "palette": PALETTE.tolist(), "ignore_index": 255, "reduce_zero_label": False}
    path.write_text(json.dumps(facts) + "\n")


def _train_encoder(scenes: list[Scene], out: Path, steps: int, seed: int) -> None:
    images, masks = np.stack([scene.image for scene in scenes]), np.stack([scene.mask for scene in scenes])
    tiny_models.train_encoder(images, masks, out, steps=steps, seed=seed)


def _train_llm(views: list[View], out: Path, steps: int, seed: int) -> None:
    documents = _documents(views, np.random.default_rng([seed, 10]))
    texts = [as_text(next(documents)) for _ in range(500)]
    tokenizer = tiny_models.train_tokenizer(texts, out)
    tiny_models.train_llm(documents, tokenizer, out, steps=steps, seed=seed)


def _documents(views: list[View], rng: np.random.Generator) -> Iterator[list[dict]]:
    """Endless conversations about pictures in words: all rows (every other time), sixteen points, or a caption."""
    while True:
        for parts in ({"rows": 8}, {"points": 16}, {"rows": 8}, {"captioned": True}):
            view = views[rng.integers(len(views))]
            yield show(dialogue(view, rng, **parts), " ".join(misread(view.names, rng)))


def _write_conversations(out: Path, views: dict[str, list[View]], scale: float, seed: int) -> None:
    """Captions (stage 1), dialogues (stage 2) and the questions asked at validation."""
    rng = np.random.default_rng([seed, 11])
    train, val = views["llava"], views["validation"]
    captions = [
        _record("llava", i, show(dialogue(train[i], rng, captioned=True)))
        for i in _cycle(rng, len(train), round(CAPTIONS * scale))
    ]
    dialogues = []
    for i in _cycle(rng, len(train), round(DIALOGUES * scale)):
        turns = dialogue(train[i], rng, rows=4, points=8, captioned=True)
        if rng.random() < TEXT_ONLY:
            dialogues.append({"id": f"text_{i}", "conversations": show(turns, " ".join(train[i].names))})
        else:
            dialogues.append(_record("llava", i, show(turns)))
    questions = [
        _record("validation", i, show(dialogue(val[i], rng, points=1)))
        for i in _cycle(rng, len(val), round(QUESTIONS * scale))
    ]
    for name, records in (("captions", captions), ("dialogues", dialogues), ("questions", questions)):
        (out / f"{name}.json").write_text(json.dumps(records) + "\n")


def _record(split: str, index: int, turns: list[dict]) -> dict:
    return {"id": f"{split}_{index:05d}", "image": _image_path(split, index), "conversations": turns}


def _cycle(rng: np.random.Generator, n: int, count: int) -> list[int]:
    """`count` indices below `n` in random order, each as often as the others."""
    passes = [rng.permutation(n) for _ in range(-(-count // n))]
    return np.concatenate(passes)[:count].tolist()


def run(args: argparse.Namespace) -> None:
    """`llava-bidir demo-assets`."""
    demo_assets(args.out, args.seed, args.scale)
