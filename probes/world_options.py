"""The options of commands that make worlds and models and study them: demo and its parts.

Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import restricted_number_type

from llava_bidir.common.cli import Count, Seed, positional

Scale = restricted_number_type("Scale", float, [(">=", 0.01), ("<=", 1000)])


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
    extras: bool = False


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
