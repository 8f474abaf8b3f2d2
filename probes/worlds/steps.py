"""Steps of `probes demo` and of experiments: commands that make worlds and models, in processes of their own."""

import os
import pickle
import sys
import time
from base64 import b85decode, b85encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json, write_files
from llava_bidir.common.imports import import_words
from probes.compute.process_group import WATCH, process_group
from probes.steps.record import Step
from probes.steps.runner import command_now, find_missing, run_steps

MASKS = ("causal", "bidirectional")
WEIGHTS = "hf/model.safetensors"
# Options of `llava-bidir fit` that name records, and folders of models
RECORDS = ("--data.annotations", "--data.val_annotations")
MODELS = ("--model.encoder.path", "--model.llm", "--model.adapter")
LOG_LINES = 20  # of a process that failed
# Importing takes as long as many commands, so that several of them share a process.
IN_CHILD_PROCESS = (
    WATCH + "import llava_bidir.cli, probes.cli; from importlib import import_module; "
    "from probes.worlds.steps import run_given; "
    "run_given(sys.argv[1], {'llava-bidir': llava_bidir.cli.main, 'probes': probes.cli.main, "
    "'python': lambda words: import_module(words[1]).main(words[2:])})"
)


def check_settings(out: Path, settings: dict) -> None:
    """Raise a UserError if OUT holds a result of other settings; else write them down."""
    file = out / "settings.json"
    found = read_json(file) if file.is_file() else settings
    if found != settings:
        text = ", ".join(f"{key} {value}" for key, value in found.items())
        raise UserError(
            f"{out} holds a result of {text}; choose another folder (--out), or delete it"
        )
    write_files({file: settings})


def make_step(out: Path, words: list[str], result: Path, reads: Sequence[Path] = ()) -> Step:
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
        steps.append(make_step(out, words=words, result=folder / stage / WEIGHTS, reads=reads))
    return steps


def to_words(options: dict) -> list[str]:
    """Return {"--seed": 0} as ["--seed", "0"]."""
    return [word for key, value in options.items() for word in (key, str(value))]


def run_in_child_process(out: Path, name: str, steps: Sequence[Step]) -> None:
    """Run what is missing of steps in one process on one thread.

    The process ends with this one, even if this one is killed: steps of the next call would meet it in their folder.

    Args:
        out: The output goes to OUT/logs/NAME.log, records to OUT/logs/steps.
        name: Of these steps together.
        steps: In order.

    Raises:
        UserError: A command has failed.
    """
    folder = out / "logs"
    missing = find_missing(steps, folder)
    if not missing:
        return
    log = folder / f"{name}.log"
    started = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name} begins, see {log}", flush=True)
    given = b85encode(pickle.dumps((folder, missing, import_words()))).decode()
    command = [sys.executable, "-c", IN_CHILD_PROCESS, given, str(os.getpid())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as said,
        process_group(command, stdout=said, stderr=said, env=environment) as process,
    ):
        status = process.wait()
    if status:
        print("\n".join(log.read_text().splitlines()[-LOG_LINES:]), file=sys.stderr)
        raise UserError(
            f"{name} has failed with status {status}; the same command goes on where it stopped, "
            f"all it said is in {log}"
        )
    print(f"{time.perf_counter() - started:4.0f} s {name}", flush=True)


def run_given(given: str, mains: Mapping[str, Callable[[list[str]], None]]) -> None:
    """Run the steps that `run_in_child_process` has given, each by the main function of its program, by name."""
    folder, steps, imports = pickle.loads(b85decode(given))

    def run(step: Step) -> None:
        program, *words = command_now(step, folder)
        mains[program]([*words, *imports])

    run_steps(steps, folder, run)
