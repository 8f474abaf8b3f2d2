"""The options of commands that make worlds and models and study them: demo, real, calibrate and their parts.

Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import pydantic

from llava_bidir.common.command_table import Command
from llava_bidir.common.options import Count, Seed, flag, positional

Scale = Annotated[float, pydantic.Field(ge=0.01, le=1000)]
World = Literal["binding", "context"]
# worlds/random_llms.py needs torch
RandomLLM = Literal[
    "shuffled",
    "normal_0.02",
    "normal_0.04",
    "normal_0.08",
    "normal_0.16",
    "normal_0.32",
    "orthogonal",
    "uniform",
    "sharp",
    "flat",
    "repeated",
    "low_rank",
    "reordered",
    "exchanged",
]
# those of planted models, and of LLMs that have learned nothing; shuffled ones are called random
CalibratedStudy = Literal[
    "planted",
    "weak",
    "random",
    "merged0",
    "merged1",
    "merged3",
    "language",
    *get_args(RandomLLM)[1:],
]


@dataclass(frozen=True, kw_only=True)
class AssetsOptions:
    """Options of `probes demo-assets`.

    Args:
        out: Folder to write; replaces an earlier world.
        seed: Seed of all random choices.
        world: What tells look-alikes apart: the rest of the scene (context), or patches of the same scene, one of
            several (binding).
        scenes: Scenes in a picture of the binding world: 1, 2 or 4.
        scale: Factor for the number of images, conversations and training steps.
        english: Write the conversations in plain English, for a language model that knows it, and train no LLM.
    """

    out: Path = positional()
    seed: Seed = 0
    world: World = "context"
    scenes: Literal[1, 2, 4] = 4
    scale: Scale = 1.0
    english: bool = flag()


@dataclass(frozen=True, kw_only=True)
class PlantOptions:
    """Options of `probes plant`.

    Args:
        what: Recovery: train its image tokens on the classes; drop: merge classes in its adapter; random: shuffle or
            draw the layers of its LLM.
        model: Exported directory (RUN/hf).
        world: Folder of demo-assets --world binding.
        out: Directory to write; replaces an earlier export.
        steps: Of recovery: optimizer steps on pictures alone.
        answer_steps: Of recovery: further steps in which questions about patches are trained, too.
        pairs: Of drop: pairs of classes to merge, up to 3; 0: none.
        weights: Of random: the layers.
        seed: Seed of batches and questions.
    """

    what: Literal["recovery", "drop", "random"] = positional()
    model: Path = positional()
    world: Path = positional()
    out: Path = positional()
    steps: Seed = 250
    answer_steps: Seed = 0
    pairs: Seed = 3
    weights: RandomLLM = "shuffled"
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of `probes demo`.

    Args:
        out: Folder of world, models, study and report.
        seed: Seed of all random choices.
        scale: Factor for the number of images, conversations and training steps; 1: half an hour, large enough for
            results.
        world: See demo-assets.
        extras: Also other tasks, patching, maps and UMAP, which no claim needs (always from scale 1).
    """

    out: Path = Path("runs/demo")
    seed: Seed = 0
    scale: Scale = 0.1
    world: World = "binding"
    extras: bool = flag()


@dataclass(frozen=True, kw_only=True)
class RealOptions:
    """Options of `probes real`.

    Args:
        out: Folder of models, world, studies and reports.
        seed: Seed of all random choices.
        minutes: Minutes on two idle cores; a stage has as many steps as fit, from a measured one.
        photos: Folder data sets with masks, instead of the toy world; questions are made from the masks.
        captions: LLaVA's JSON with captions for --photos (default: lists of classes from the masks).
        caption_images: Folder of the photos of --captions (default: that of the file).
        hours: With --photos, instead of --minutes.
        image_px: With --photos, side of the encoder's square, a multiple of 14 px (default: 112, 64 image tokens).
        questions: With --photos, held-out questions about each data set (default: 200).
        train_only: Train the models, and study none.
        steps: Steps of stage 2, and of stage 1 as many (with photos, half as many again), instead of as many as fit.
        draws: Draws of each kind of random LLM in the study.
        controls: Also train and study what tells language from training: the model after stage 1, and one of random
            weights; takes hours.
    """

    out: Path = Path("runs/real")
    seed: Seed = 0
    minutes: Annotated[float, pydantic.Field(ge=1, le=100_000)] = 45
    photos: tuple[Path, ...] | None = None
    captions: Path | None = None
    caption_images: Path | None = None
    hours: Annotated[float, pydantic.Field(ge=0.1, le=10_000)] | None = None
    image_px: Count | None = None
    questions: Count | None = None
    train_only: bool = flag()
    steps: Count | None = None
    draws: Seed = 2
    controls: bool = flag()


@dataclass(frozen=True, kw_only=True)
class QuestionsOptions:
    """Options of `probes questions`.

    Args:
        data: Folder data set: images, masks and classes.json (probes/README.md, Your own data).
        out: Folder for captions.json, dialogues.json and questions.json.
        seed: Seed of all random choices.
        grid: Rows and columns of places that are asked about.
        per_photo: Questions about each training photo, on average.
        held_out: Questions about all validation photos.
    """

    data: Path = positional()
    out: Path
    seed: Seed = 0
    grid: Count = 4
    per_photo: Count = 6
    held_out: Count = 200


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Options of `probes calibrate`.

    Args:
        out: Folder of all seeds.
        seeds: Seeds to run; the table has all that are in the folder.
        scale: Size of the world, see `probes demo-assets`.
        scenes: Scenes in a picture: 2 or 4.
        studies: Some of the studies: of planted models, or of LLMs that have learned nothing (default: all).
    """

    out: Path = Path("runs/calibrate")
    seeds: tuple[Seed, ...] = tuple(range(10))
    scale: Scale = 0.1
    scenes: Literal[2, 4] = 2
    studies: tuple[CalibratedStudy, ...] | None = None


WORLD_COMMANDS = {
    "demo-assets": Command(
        "probes.worlds.assets:run",
        "write the toy world in the formats of the real data",
        AssetsOptions,
    ),
    "plant": Command(
        "probes.worlds.plant:run",
        "edit a model of the binding world so that the truth of a claim is known",
        PlantOptions,
    ),
    "demo": Command(
        "probes.worlds.demo:run",
        (
            "train, probe and report on a toy world, in minutes on two CPU cores; again: "
            "only what is missing"
        ),
        DemoOptions,
    ),
    "real": Command(
        "probes.worlds.real:run",
        (
            "the demo with a real encoder (DINOv2-S) and a real language model "
            "(SmolLM2-135M), on the toy world or on photos; again: only what is missing"
        ),
        RealOptions,
    ),
    "questions": Command(
        "probes.worlds.questions:run",
        (
            "make conversations about photos from their masks, balanced so that a blind "
            "answer is right in half"
        ),
        QuestionsOptions,
    ),
    "calibrate": Command(
        "probes.worlds.calibrate:run",
        (
            "plant effects in models of a toy world and count how often each verdict says "
            "yes, where it should and not"
        ),
        CalibrateOptions,
    ),
}
