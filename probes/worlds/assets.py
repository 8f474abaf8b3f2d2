"""`probes demo-assets`: draw the toy world, train its tiny encoder and LLM, and write all of it to disk.

OUT/segmentation/{images,annotations}/{training,validation}/*.png, classes.json    ADE20K's folder layout
OUT/segmentation/patches.json    of each picture: the scene of each patch, and whether it shows a cue
OUT/llava/{images,annotations}/training/*.png, classes.json    images of the conversations, same layout
OUT/captions.json, dialogues.json, questions.json                                  LLaVA's JSON
OUT/encoder/, OUT/llm/                                                             Hugging Face directories
"""

import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from llava_bidir.common.files import atomic_directory
from probes.config import AssetsOptions

from . import tiny_models
from .binding import Mosaic, draw_mosaic, mix_mosaics
from .canvas import CLASSES, PALETTE
from .dialogues import (
    SceneText,
    Turn,
    build_dialogue,
    find_regions,
    format_turns,
    prepend_picture,
    swap_names,
)
from .scenes import Scene

Split = tuple[str, str]  # folder below OUT, and split of the layout
TRAINING = ("llava", "training")  # of conversations
VALIDATION = ("segmentation", "validation")
# Pictures by folder and split. The index of a split is part of its seed, so that new ones go to the end.
PICTURES = {TRAINING: 3000, ("segmentation", "training"): 1000, VALIDATION: 600}
# of conversations, at most as many as elsewhere: binding is not learned from a few hundred
SMALL_WORLDS_PICTURES = 16000
CAPTIONS = 1920
DIALOGUES = 4480
QUESTIONS = 400
# share of dialogues with the picture in words, for the text-only samples of LLaVA's mix
TEXT_ONLY = 0.05
# both take about the same time and run in parallel
ENCODER_STEPS = 1400
LLM_STEPS = 240
# largest share of a picture's names that are replaced by their look-alike in the LLM's texts
SWAPPED_NAMES = 0.5
CHUNK = 100


def run(options: AssetsOptions) -> None:
    """Write the toy world: pictures with masks, conversations, a tiny encoder and a tiny LLM."""
    scale = options.scale
    seed = options.seed
    counts = {split: max(16, round(count * scale)) for split, count in PICTURES.items()}
    counts[TRAINING] = max(16, min(PICTURES[TRAINING], round(SMALL_WORLDS_PICTURES * scale)))
    workers = ProcessPoolExecutor(
        max_workers=2,
        mp_context=multiprocessing.get_context("spawn"),  # torch's threads do not survive a fork
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    with atomic_directory(options.out, marker="questions.json") as partial, workers as pool:
        drawn = _draw_splits(pool, out=partial, counts=counts, seed=seed, scenes=options.scenes)
        train = [SceneText.from_mosaic(mosaic) for mosaic in drawn[TRAINING]]
        val = [SceneText.from_mosaic(mosaic) for mosaic in drawn[VALIDATION]]
        encoder = pool.submit(
            tiny_models.train_encoder,
            images=np.stack([mosaic.image for mosaic in drawn[TRAINING]]),
            masks=np.stack([mosaic.mask for mosaic in drawn[TRAINING]]),
            out=partial / "encoder",
            steps=round(ENCODER_STEPS * scale),
            seed=seed,
        )
        llm_steps = round(LLM_STEPS * scale)
        llm = pool.submit(_train_llm, train, out=partial / "llm", steps=llm_steps, seed=seed)
        write_classes(partial)
        _write_patches(partial / "segmentation/patches.json", drawn)
        rng = np.random.default_rng([seed, 11])
        conversations = _build_conversations(train, val=val, scale=scale, rng=rng)
        for name, records in conversations.items():
            (partial / f"{name}.json").write_text(json.dumps(records) + "\n")
        encoder.result()
        llm.result()
    print(f"wrote {options.out}")


def _draw_splits(
    pool: ProcessPoolExecutor, out: Path, counts: dict[Split, int], seed: int, scenes: int
) -> dict[Split, list[Mosaic]]:
    """Draw and write all splits. Each chunk has its own generator, so the size of the pool does not matter."""
    jobs = []
    for split, total in counts.items():
        for start in range(0, total, CHUNK):
            job = pool.submit(
                _draw_chunk,
                out,
                split=split,
                start=start,
                count=min(CHUNK, total - start),
                seed=seed,
                scenes=scenes,
            )
            jobs.append((split, job))
    drawn = {split: [] for split in counts}
    for split, job in tqdm(jobs, desc="drawing scenes", mininterval=5):
        drawn[split] += job.result()
    return drawn


def _draw_chunk(
    out: Path, split: Split, start: int, count: int, seed: int, scenes: int
) -> list[Mosaic]:
    rng = np.random.default_rng([seed, [*PICTURES].index(split), start])
    if split == TRAINING:
        every_second_has_one = np.where(np.arange(count) % 2, 1, scenes)
        drawn = mix_mosaics(rng, every_second_has_one)
    else:
        drawn = [draw_mosaic(rng, scenes) for _ in range(count)]
    save_pictures(out, split=split, drawn=drawn, start=start)
    return drawn


def save_pictures(out: Path, split: Split, drawn: Sequence[Scene | Mosaic], start: int = 0) -> None:
    """Write pictures and their masks, numbered from `start`."""
    for i, scene in enumerate(drawn, start):
        for kind, pixels in (("images", scene.image), ("annotations", scene.mask)):
            path = out / name_picture(split, i, kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, compress_level=1)


def name_picture(split: Split, index: int, kind: str = "images") -> str:
    """Return the path of a picture or of its mask, below OUT."""
    folder, part = split
    return f"{folder}/{kind}/{part}/{index:05d}.png"


def write_classes(out: Path) -> None:
    """Write the classes.json of both folders of pictures."""
    classes = {
        "classes": CLASSES,
        "palette": PALETTE.tolist(),
        "ignore_index": 255,
        "reduce_zero_label": False,
    }
    for folder in ("llava", "segmentation"):
        (out / folder / "classes.json").write_text(json.dumps(classes) + "\n")


def _write_patches(file: Path, drawn: dict[Split, list[Mosaic]]) -> None:
    """Write what the truth of a knockout needs: the scene of each patch, and whether it shows a cue."""
    splits = {}
    for (folder, part), mosaics in drawn.items():
        if folder == "segmentation":
            splits[part] = [
                {"scene": mosaic.scene.tolist(), "cue": mosaic.cue.tolist()} for mosaic in mosaics
            ]
    file.write_text(json.dumps(splits) + "\n")


def _train_llm(texts: list[SceneText], out: Path, steps: int, seed: int) -> None:
    documents = _generate_documents(texts, np.random.default_rng([seed, 10]))
    first = [format_turns(next(documents)) for _ in range(500)]
    tokenizer = tiny_models.train_tokenizer(first, out)
    tiny_models.train_llm(documents, tokenizer, out, steps=steps, seed=seed)


def _generate_documents(texts: list[SceneText], rng: np.random.Generator) -> Iterator[list[Turn]]:
    """Yield conversations about pictures in words without end: all rows (every second), 16 points, or a caption."""
    while True:
        for questions in ({"rows": 8}, {"points": 16}, {"rows": 8}, {"caption": True}):
            text = texts[rng.integers(len(texts))]
            dialogue = build_dialogue(text, rng, **questions)
            seen = swap_names(text.names, most=SWAPPED_NAMES, rng=rng)
            yield prepend_picture(dialogue, " ".join(seen))


def _build_conversations(
    train: list[SceneText], val: list[SceneText], scale: float, rng: np.random.Generator
) -> dict[str, list[dict]]:
    """Return the captions of stage 1, the dialogues of stage 2 and the validation questions."""
    captions = []
    for i in sample_evenly(rng, len(train), CAPTIONS * scale):
        turns = build_dialogue(train[i], rng, caption=True)
        captions.append(make_record(TRAINING, i, turns))
    dialogues = []
    for i in sample_evenly(rng, len(train), DIALOGUES * scale):
        turns = build_dialogue(train[i], rng, rows=4, points=8, caption=True)
        if rng.random() < TEXT_ONLY:
            turns = prepend_picture(turns, " ".join(train[i].names))
            dialogues.append({"id": f"text_{i}", "conversations": turns})
        else:
            dialogues.append(make_record(TRAINING, i, turns))
    questions = []
    for i in sample_evenly(rng, len(val), QUESTIONS * scale):
        turns = build_dialogue(val[i], rng, points=1, look_alikes=True)
        questions.append(make_record(VALIDATION, i, turns) | {"regions": find_regions(turns)})
    return {"captions": captions, "dialogues": dialogues, "questions": questions}


def sample_evenly(rng: np.random.Generator, n: int, count: float) -> list[int]:
    """Return `count` indices below `n` in random order, at least one, each equally often."""
    count = max(1, round(count))
    rounds = math.ceil(count / n)
    passes = [rng.permutation(n) for _ in range(rounds)]
    return np.concatenate(passes)[:count].tolist()


def make_record(split: Split, index: int, turns: list[Turn]) -> dict:
    """Return a record of LLaVA's JSON about a picture."""
    name = split[1]
    if split == TRAINING:
        name = "llava"
    return {
        "id": f"{name}_{index:05d}",
        "image": name_picture(split, index),
        "conversations": prepend_picture(turns),
    }
