"""Steps of `probes demo` and of experiments: commands that make worlds and models, in processes of their own.

`run_in_child_process` starts this module as a program, and gives it the steps that are missing by its standard input.
"""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json, write_files
from llava_bidir.common.imports import import_words
from probes.compute.process_group import end_with_parent, process_group
from probes.steps.record import Step
from probes.steps.runner import command_now, find_missing, run_steps

MASKS = ("causal", "bidirectional")
WEIGHTS = "hf/model.safetensors"
# Options of `llava-bidir fit` that name records, and folders of models
RECORDS = ("--data.annotations", "--data.val_annotations")
MODELS = ("--model.encoder.path", "--model.llm", "--model.adapter")
LOG_LINES = 20  # of a process that failed
CHILD_PROCESS = ("-m", "probes.worlds.steps")  # words of Python


def check_settings(out: Path, settings: dict) -> None:
    """Raise a UserError if OUT holds a result of other settings; else write them down."""
    file = out / "settings.json"
    if file.is_file():
        recorded = read_json(file)
        if recorded != settings:
            text = ", ".join(f"{key} {value}" for key, value in recorded.items())
            raise UserError(
                f"{out} holds a result of {text}; choose another folder (--out), or delete it"
            )
    write_files({file: settings})


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
    words = []
    for name, value in options.items():
        words += [name, str(value)]
    return words


def make_step(out: Path, words: Sequence[str], result: Path, reads: Sequence[Path] = ()) -> Step:
    """Return the step of a command that makes a folder below OUT.

    Args:
        out: OUT.
        words: The program, "llava-bidir", "probes" or "python", and the words of its command.
        result: A file of the folder, which is written last.
        reads: If one of these files changes, the step is done again.
    """
    folder = result.parent
    if result.match(WEIGHTS):
        folder = folder.parent
    program, command, *_ = words
    return Step(
        name=str(folder.relative_to(out)),
        config=tuple(words),
        result=result,
        kind=f"{program} {command} {folder.name}",
        reads={os.path.relpath(file, out): file for file in reads},
        takes_overwrite=command == "fit",
    )


def run_in_child_process(out: Path, name: str, steps: Sequence[Step]) -> None:
    """Run what is missing of steps in one process on one thread: importing takes as long as many commands.

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
    with (
        log.open("w") as said,
        process_group(
            [sys.executable, *CHILD_PROCESS, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        process.communicate(pickle.dumps((missing, folder, import_words())))
        status = process.returncode
    if status:
        last_lines = log.read_text().splitlines()[-LOG_LINES:]
        print("\n".join(last_lines), file=sys.stderr)
        raise UserError(
            f"{name} has failed with status {status}; the same command goes on where it stopped, "
            f"all it said is in {log}"
        )
    print(f"{time.perf_counter() - started:4.0f} s {name}", flush=True)


def main() -> None:
    """Run the steps that `run_in_child_process` has given to this process."""
    end_with_parent(parent=int(sys.argv[1]))
    steps, folder, imports = pickle.load(sys.stdin.buffer)
    # imported here, as this takes a while, in which the parent may end
    import llava_bidir.cli
    import probes.cli

    programs = {
        "llava-bidir": llava_bidir.cli.main,
        "probes": probes.cli.main,
        "python": run_module,
    }
    run_commands(steps, folder=folder, imports=imports, programs=programs)


def run_module(words: Sequence[str]) -> None:
    """Run the main function of a module: -m MODULE and its words."""
    _, module, *arguments = words
    import_module(module).main(arguments)


def run_commands(
    steps: Sequence[Step],
    folder: Path,
    imports: Sequence[str],
    programs: Mapping[str, Callable[[list[str]], None]],
) -> None:
    """Run steps in order, each by the main function of its program, by name.

    Args:
        steps: Those that are missing.
        folder: Of their records.
        imports: Words that are added to each command (`--import FILE.py`).
        programs: Main functions.
    """

    def run_command(step: Step) -> None:
        program, *words = command_now(step, folder)
        programs[program]([*words, *imports])

    run_steps(steps, folder, run_command)


if __name__ == "__main__":
    main()
