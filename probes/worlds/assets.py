"""`probes demo-assets`: draw the toy world, train its tiny encoder and LLM, and write all of it to disk.

OUT/segmentation/{images,annotations}/{training,validation}/*.png, classes.json    ADE20K's folder layout
OUT/segmentation/{depth,normals,instances}/{training,validation}/*.png, targets.json    targets of the other tasks
OUT/llava/{images,annotations}/training/*.png, classes.json    images of the conversations, same layout
OUT/captions.json, dialogues.json, questions.json                                  LLaVA's JSON
OUT/encoder/, OUT/llm/                                                             Hugging Face directories

The binding world has no other tasks, but

OUT/one_scene/{images,annotations}/{training,validation}/*.png, classes.json    pictures of one scene, same layout
OUT/segmentation/patches.json    of each picture: the scene of each patch, and whether it shows a cue
"""

import functools
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
from probes.world_options import AssetsOptions

from . import english as plain_english
from . import tiny_models
from .binding import Mosaic, draw_mosaic, mix_mosaics
from .canvas import CLASSES, PALETTE
from .dialogues import (
    SceneText,
    build_dialogue,
    find_regions,
    format_turns,
    prepend_picture,
    swap_names,
)
from .scenes import Scene, draw_scene
from .surfaces import Surfaces

# Pictures by folder and split. The index of a split is part of its seed, so that new ones go to the end.
PICTURES = {
    ("llava", "training"): 3000,
    ("segmentation", "training"): 1000,
    ("segmentation", "validation"): 600,
}
ONE_SCENE = {("one_scene", "training"): 1000, ("one_scene", "validation"): 600}
SPLITS = [*PICTURES, *ONE_SCENE]
# of conversations, at most as many as elsewhere: binding is not learned from a few hundred
BINDING_PICTURES = 16000
CAPTIONS = 1920
DIALOGUES = 4480
QUESTIONS = 400
# questions of a dialogue in plain English, about 330 tokens with the picture
ENGLISH = {"choices": 3, "points": 1}
# share of dialogues with the picture in words, for the text-only samples of LLaVA's mix
TEXT_ONLY = 0.05
# both take about the same time and run in parallel
ENCODER_STEPS = 1400
LLM_STEPS = 240
SCENES = 4  # in a picture of the binding world
# largest share of a picture's names that are replaced by their look-alike in the LLM's texts
SWAPPED_NAMES = 0.5
# of conversations
TRAINING = ("llava", "training")
VALIDATION = ("segmentation", "validation")
CHUNK = 100
Split = tuple[str, str]  # folder below OUT, and split of the layout
DEPTH_SCALE = 0.001  # metres per unit of a depth map: millimetres, as in NYUv2


def demo_assets(
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    world: str = "context",
    scenes: int = SCENES,
    english: bool = False,
) -> None:
    """Write the toy world: scenes with masks, conversations, a tiny encoder and a tiny LLM.

    Args:
        out: Folder. An earlier world is replaced.
        seed: Random seed of everything.
        scale: Share of the full demo's pictures, conversations and training steps, for quick trials.
        world: "context", in which look-alikes can only be told apart by the rest of the scene, or "binding", in which a
            picture has several scenes, and only patches of the same one tell.
        scenes: Scenes in a picture of the binding world.
        english: Write the conversations in plain English, for a language model that knows it, and train no LLM.
    """
    binding = world == "binding"
    pictures = PICTURES | ONE_SCENE if binding else PICTURES
    sizes = {name: max(16, round(n * scale)) for name, n in pictures.items()}
    if binding:
        sizes["llava", "training"] = max(
            16, min(PICTURES["llava", "training"], round(BINDING_PICTURES * scale))
        )
    # spawn, since torch's threads do not survive a fork
    workers = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), _one_thread)
    with atomic_directory(out, marker="questions.json") as partial, workers as pool:
        drawn = _draw_splits(
            pool,
            partial,
            sizes,
            seed,
            scenes if binding else None,
        )
        texts = {
            name: [SceneText.from_scene(scene) for scene in split] for name, split in drawn.items()
        }
        train = drawn[TRAINING]
        jobs = [
            pool.submit(
                _train_encoder,
                train,
                partial / "encoder",
                round(ENCODER_STEPS * scale),
                seed,
            )
        ]
        if not english:
            words = (
                texts[TRAINING],
                partial / "llm",
                round(LLM_STEPS * scale),
                seed,
                4 if binding else 6,
            )
            jobs.append(pool.submit(_train_llm, *words))
        for folder in {folder for folder, _ in sizes}:
            _write_classes(partial / folder)
        if binding:
            _write_patches(partial / "segmentation", drawn)
        else:
            (partial / "segmentation/targets.json").write_text(
                json.dumps({"depth_scale": DEPTH_SCALE}) + "\n"
            )
        build = (
            _build_english
            if english
            else functools.partial(_build_conversations, look_alikes=binding)
        )
        for name, records in build(texts, scale, np.random.default_rng([seed, 11])).items():
            (partial / f"{name}.json").write_text(json.dumps(records) + "\n")
        for job in jobs:
            job.result()
    print(
        f"{out}: "
        + ", ".join(f"{n} pictures in {folder}/{split}" for (folder, split), n in sizes.items())
    )


def _one_thread() -> None:
    torch.set_num_threads(1)


def _draw_splits(
    pool: ProcessPoolExecutor,
    out: Path,
    sizes: dict[Split, int],
    seed: int,
    scenes: int | None,
) -> dict[Split, list[Scene | Mosaic]]:
    """Draw and write all splits. Each chunk has its own generator, so the size of the pool does not matter."""
    jobs = {
        (split, start): pool.submit(
            _draw_chunk,
            out,
            split,
            start,
            min(CHUNK, n - start),
            seed,
            scenes,
        )
        for split, n in sizes.items()
        for start in range(0, n, CHUNK)
    }
    drawn = {split: [] for split in sizes}
    for (split, _), job in tqdm(jobs.items(), desc="drawing scenes", mininterval=5):
        drawn[split] += job.result()
    return drawn


def _draw_chunk(
    out: Path,
    split: Split,
    start: int,
    count: int,
    seed: int,
    scenes: int | None,
) -> list[Scene | Mosaic]:
    rng = np.random.default_rng([seed, SPLITS.index(split), start])
    if scenes is None:
        drawn = [draw_scene(rng) for _ in range(count)]
    elif split[0] == "llava":  # half of the pictures have one scene, as those in one_scene
        drawn = mix_mosaics(rng, [1 if i % 2 else scenes for i in range(count)])
    else:
        drawn = [draw_mosaic(rng, 1 if split[0] == "one_scene" else scenes) for _ in range(count)]
    for i, scene in enumerate(drawn, start):
        _save(scene.image, out / _path("images", split, i))
        _save(scene.mask, out / _path("annotations", split, i))
        if split[0] == "segmentation" and isinstance(scene, Scene):
            for kind, pixels in _encode_targets(scene.surfaces).items():
                _save(pixels, out / _path(kind, split, i))
    return drawn


def _encode_targets(surfaces: Surfaces) -> dict[str, np.ndarray]:
    """Return depth, normals and instances as stored in PNG files; 0 and black are no value."""
    depth = np.nan_to_num(surfaces.depth())
    normals = surfaces.normals()
    rounded = np.where(np.isnan(normals), 0, (normals + 1) * 127.5 + 0.5)  # from -1..1 to 0..255
    return {
        "depth": (depth / DEPTH_SCALE + 0.5).astype(np.uint16),
        "normals": rounded.astype(np.uint8),
        "instances": surfaces.instance_ids(),
    }


def _path(kind: str, split: Split, index: int) -> str:
    return f"{split[0]}/{kind}/{split[1]}/{index:05d}.png"


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)


def _write_patches(folder: Path, drawn: dict[Split, list[Mosaic]]) -> None:
    """Write what the truth of a knockout needs: the scene of each patch, and whether it shows a cue."""
    splits = {
        split: [{"scene": m.scene.tolist(), "cue": m.cue.tolist()} for m in mosaics]
        for (name, split), mosaics in drawn.items()
        if name == folder.name
    }
    (folder / "patches.json").write_text(json.dumps(splits) + "\n")


def _write_classes(folder: Path) -> None:
    classes = {
        "classes": CLASSES,
        "palette": PALETTE.tolist(),
        "ignore_index": 255,
        "reduce_zero_label": False,
    }
    (folder / "classes.json").write_text(json.dumps(classes) + "\n")


def _train_encoder(
    scenes: list[Scene],
    out: Path,
    steps: int,
    seed: int,
) -> None:
    images = np.stack([scene.image for scene in scenes])
    masks = np.stack([scene.mask for scene in scenes])
    tiny_models.train_encoder(images, masks, out, steps=steps, seed=seed)


def _train_llm(
    scenes: list[SceneText],
    out: Path,
    steps: int,
    seed: int,
    layers: int,
) -> None:
    documents = _generate_documents(scenes, np.random.default_rng([seed, 10]))
    tokenizer = tiny_models.train_tokenizer(
        [format_turns(next(documents)) for _ in range(500)], out
    )
    tiny_models.train_llm(
        documents,
        tokenizer,
        out,
        steps=steps,
        seed=seed,
        layers=layers,
    )


def _generate_documents(scenes: list[SceneText], rng: np.random.Generator) -> Iterator[list[dict]]:
    """Yield conversations about pictures in words without end: all rows (every second), 16 points, or a caption."""
    while True:
        for parts in ({"rows": 8}, {"points": 16}, {"rows": 8}, {"caption": True}):
            scene = scenes[rng.integers(len(scenes))]
            dialogue = build_dialogue(scene, rng, **parts)
            yield prepend_picture(dialogue, " ".join(swap_names(scene.names, SWAPPED_NAMES, rng)))


def _build_conversations(
    texts: dict[Split, list[SceneText]],
    scale: float,
    rng: np.random.Generator,
    look_alikes: bool,
) -> dict[str, list[dict]]:
    """Return the captions of stage 1, the dialogues of stage 2 and the validation questions."""
    train = texts[TRAINING]
    val = texts[VALIDATION]
    captions = [
        _record(TRAINING, i, build_dialogue(train[i], rng, caption=True))
        for i in _sample_evenly(rng, len(train), max(1, round(CAPTIONS * scale)))
    ]
    dialogues = []
    for i in _sample_evenly(rng, len(train), max(1, round(DIALOGUES * scale))):
        turns = build_dialogue(
            train[i],
            rng,
            rows=4,
            points=8,
            caption=True,
        )
        if rng.random() < TEXT_ONLY:
            turns = prepend_picture(turns, " ".join(train[i].names))
            dialogues.append({"id": f"text_{i}", "conversations": turns})
        else:
            dialogues.append(_record(TRAINING, i, turns))
    questions = [
        _record(VALIDATION, i, build_dialogue(val[i], rng, points=1, look_alikes=look_alikes))
        for i in _sample_evenly(rng, len(val), max(1, round(QUESTIONS * scale)))
    ]
    questions = [
        record | {"regions": find_regions(record["conversations"])} for record in questions
    ]
    return {
        "captions": captions,
        "dialogues": dialogues,
        "questions": questions,
    }


def _build_english(
    texts: dict[Split, list[SceneText]], scale: float, rng: np.random.Generator
) -> dict[str, list[dict]]:
    """Return the same in plain English; each question is asked about two pictures."""
    train = texts[TRAINING]
    val = texts[VALIDATION]

    def other(texts):
        return texts[rng.integers(len(texts))]

    captions = [
        _record(TRAINING, i, plain_english.describe(train[i], rng))
        for i in _sample_evenly(rng, len(train), max(1, round(CAPTIONS * scale)))
    ]
    dialogues = [
        _record(TRAINING, i, plain_english.build_dialogue(train[i], other(train), rng, **ENGLISH))
        for i in _sample_evenly(rng, len(train), max(1, round(DIALOGUES * scale)))
    ]
    questions = []
    for first in _sample_evenly(rng, len(val), max(1, round(QUESTIONS * scale))):
        second = int(rng.integers(len(val)))
        asked = plain_english.ask_both(val[first], val[second], rng)
        for i, (turns, regions) in zip((first, second), asked, strict=False):
            questions.append(_record(VALIDATION, i, turns) | {"regions": regions})
    return {
        "captions": captions,
        "dialogues": dialogues,
        "questions": questions,
    }


def _record(split: Split, index: int, turns: list[dict]) -> dict:
    name = "llava" if split == TRAINING else split[1]
    turns = prepend_picture(turns)
    return {
        "id": f"{name}_{index:05d}",
        "image": _path("images", split, index),
        "conversations": turns,
    }


def _sample_evenly(rng: np.random.Generator, n: int, count: int) -> list[int]:
    """Return `count` indices below `n` in random order, each equally often."""
    passes = [rng.permutation(n) for _ in range(-(-count // n))]
    return np.concatenate(passes)[:count].tolist()


def run(options: AssetsOptions) -> None:
    """Run `probes demo-assets`."""
    demo_assets(
        options.out, options.seed, options.scale, options.world, options.scenes, options.english
    )
