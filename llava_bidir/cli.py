"""The `llava-bidir` command."""

import sys
import traceback
from importlib import import_module
from pathlib import Path

# command -> (module with a function of that name, what it does). Modules are imported when their command runs.
COMMANDS = {
    "fit": ("llava_bidir.training.cli", "train a stage: -c configs/stage1.yaml -c configs/encoder/clip.yaml"),
    "validate": ("llava_bidir.training.cli", "loss and answers of a checkpoint on the validation questions"),
    "test": ("llava_bidir.training.cli", "the same as validate"),
    "export": ("llava_bidir.export", "a training checkpoint -> a Hugging Face directory"),
    "inspect": ("llava_bidir.inspection", "what the model is really fed: tokens, labels, mask"),
    "generate": ("llava_bidir.generate", "answers about an image"),
    "demo-assets": ("llava_bidir.demo.assets", "the toy world on disk, in the formats of the real data"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command; `--help` behind it lists its options."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    command, arguments = argv[0], argv[1:]
    if command not in COMMANDS:
        sys.exit(f"llava-bidir: unknown command {command!r}\n\n{usage()}")
    module = import_module(COMMANDS[command][0])
    try:
        module.main(command, arguments)
    except ValueError as error:
        if not _raised_here(error):
            raise
        sys.exit(f"llava-bidir {command}: {error}")


def _raised_here(error: ValueError) -> bool:
    """Whether this package raised it: then it is about the user's input and says all; a bug keeps its traceback."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(Path(__file__).parent)


def usage() -> str:
    lines = ["usage: llava-bidir COMMAND [options]", "", "LLaVA-1.5 with or without bidirectional image attention.", ""]
    lines += [f"  {name:<12} {help_text}" for name, (_, help_text) in COMMANDS.items()]
    return "\n".join([*lines, "", "llava-bidir COMMAND --help lists the options of a command."])
