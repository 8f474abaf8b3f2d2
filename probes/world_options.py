"""The options of commands that make worlds and models and study them: demo and its parts.

Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from llava_bidir.common.command_table import Command
from llava_bidir.common.options import Count, Seed, flag, positional

Scale = Annotated[float, pydantic.Field(ge=0.01, le=1000)]


@dataclass(frozen=True, kw_only=True)
class AssetsOptions:
    """Options of `probes demo-assets`.

    Args:
        out: Folder to write; replaces an earlier world.
        seed: Seed of all random choices.
        scenes: Scenes in a picture: 1, 2 or 4.
        scale: Factor for the number of images, conversations and training steps.
    """

    out: Path = positional()
    seed: Seed = 0
    scenes: Literal[1, 2, 4] = 4
    scale: Scale = 1.0


@dataclass(frozen=True, kw_only=True)
class PlantOptions:
    """Options of `probes plant`.

    Args:
        what: Recovery: train its image tokens on the classes; drop: merge classes in its adapter; random: shuffle the
            layers of its LLM.
        model: Exported directory (RUN/hf).
        world: Folder of demo-assets.
        out: Directory to write; replaces an earlier export.
        steps: Of recovery: optimizer steps on pictures alone.
        answer_steps: Of recovery: further steps in which questions about patches are trained, too.
        pairs: Of drop: pairs of classes to merge, up to 3; 0: none.
        seed: Seed of batches and questions.
    """

    what: Literal["recovery", "drop", "random"] = positional()
    model: Path = positional()
    world: Path = positional()
    out: Path = positional()
    steps: Seed = 250
    answer_steps: Seed = 0
    pairs: Seed = 3
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of `probes demo`.

    Args:
        out: Folder of world, models, study and report.
        seed: Seed of all random choices.
        scale: Factor for the number of images, conversations and training steps; 1: half an hour, large enough for
            results.
        extras: Also analyses that no claim needs (always from scale 1).
    """

    out: Path = Path("runs/demo")
    seed: Seed = 0
    scale: Scale = 0.1
    extras: bool = flag()


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


WORLD_COMMANDS = {
    "demo-assets": Command(
        "probes.worlds.assets:run",
        "write the toy world in the formats of the real data",
        AssetsOptions,
    ),
    "plant": Command(
        "probes.worlds.plant:run",
        "edit a model of the toy world so that the truth of a claim is known",
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
    "questions": Command(
        "probes.worlds.questions:run",
        (
            "make conversations about photos from their masks, balanced so that a blind "
            "answer is right in half"
        ),
        QuestionsOptions,
    ),
}
