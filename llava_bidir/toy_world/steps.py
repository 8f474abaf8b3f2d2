"""Steps of `llava-bidir demo` and `llava-bidir real`: commands in processes, and only those that are missing."""

from pathlib import Path

from llava_bidir.common.atomic_io import read_json, write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.process_group import Step, process_group, several_commands

MASKS = ("causal", "bidirectional")
WEIGHTS = "hf/model.safetensors"


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


def training_steps(folder: Path, stages: dict[str, dict], needed: Path) -> list[Step]:
    """Return the steps that train a model into FOLDER/STAGE.

    Args:
        folder: Folder of the model.
        stages: Options of `llava-bidir fit` by stage.
        needed: What the first stage needs; each other one needs the one before.
    """
    steps: list[Step] = []
    for stage, options in stages.items():
        result = folder / stage / WEIGHTS
        how = ["--overwrite", "true"] if result.is_file() else ["--ckpt_path", "last"]
        steps.append(
            (result, ["fit", *to_words(options), "--out", f"{folder}/{stage}", *how], needed)
        )
        needed = result
    return steps


def run_studies(out: Path, studies: list[list[str]]) -> None:
    """Run `probes study` with each list of words in one process; results of models made again are replaced."""
    commands = [["study", *words, "--overwrite", "true"] for words in studies]
    with process_group(several_commands("probes", commands)) as process:
        status = process.wait()
    if status:
        raise UserError(
            f"a study has failed; all it said is in {out / 'study.log'}, or in the folder of another study"
        )


def to_words(options: dict) -> list[str]:
    """Return {"--seed": 0} as ["--seed", "0"]."""
    return [word for key, value in options.items() for word in (key, str(value))]
