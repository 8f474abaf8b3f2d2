"""Steps of `probes demo` and of experiments: commands that make worlds and models."""

import os
from collections.abc import Sequence
from pathlib import Path

from llava_bidir.common.atomic_io import read_json, write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.steps import Step

MASKS = ("causal", "bidirectional")
WEIGHTS = "hf/model.safetensors"
# Options of `llava-bidir fit` that name records, and folders of models
RECORDS = ("--data.annotations", "--data.val_annotations")
MODELS = ("--model.encoder.path", "--model.llm", "--model.adapter")
SCENES = 2  # in a picture of the demo's binding world


def check_settings(out: Path, settings: dict) -> None:
    """Raise a UserError if OUT holds a result of other settings; else write them down."""
    file = out / "settings.json"
    found = read_json(file) if file.is_file() else settings
    if found != settings:
        text = ", ".join(f"{key} {value}" for key, value in found.items())
        raise UserError(
            f"{out} holds a result of {text}; choose another folder (--out), or delete it"
        )
    if not file.is_file():
        write_files({file: settings})


def make_step(
    out: Path,
    words: list[str],
    result: Path,
    reads: Sequence[Path] = (),
) -> Step:
    """Return the step of a command that makes a folder below OUT.

    Args:
        out: OUT.
        words: The program, "llava-bidir" or "probes", and the words of its command.
        result: A file of the folder, which is written last.
        reads: If one of these files changes, the step is done again.
    """
    folder = result.parent.parent if result.match(WEIGHTS) else result.parent
    return Step(
        str(folder.relative_to(out)),
        tuple(words),
        result,
        kind=f"{words[0]} {words[1]} {folder.name}",
        reads={os.path.relpath(file, out): file for file in reads},
        takes_overwrite=words[1] == "fit",
    )


def training_steps(out: Path, folder: Path, stages: dict[str, dict]) -> list[Step]:
    """Return the steps that train a model into FOLDER/STAGE.

    Args:
        out: OUT.
        folder: Folder of the model, below OUT.
        stages: Options of `llava-bidir fit` by stage. Each reads its records and the weights that it begins with.
    """
    steps = []
    for stage, options in stages.items():
        words = ["llava-bidir", "fit", *to_words(options)]
        words += ["--out", f"{folder}/{stage}", "--ckpt_path", "last"]
        reads = [Path(options[name]) for name in RECORDS if name in options]
        reads += [Path(options[name]) / "model.safetensors" for name in MODELS if name in options]
        steps.append(
            make_step(
                out,
                words,
                folder / stage / WEIGHTS,
                reads,
            )
        )
    return steps


def to_words(options: dict) -> list[str]:
    """Return {"--seed": 0} as ["--seed", "0"]."""
    return [word for key, value in options.items() for word in (key, str(value))]
