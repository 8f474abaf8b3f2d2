"""The `probes` command."""

import sys
import traceback
from importlib import import_module
from pathlib import Path

# command -> (module, function; what it does). Modules are imported when their command runs.
COMMANDS = {
    "fit": ("probes.training", "train a probe at every site: -c configs/probes/ade20k.yaml --model.mllm DIR"),
    "validate": ("probes.training", "scores of a checkpoint's probes as they are"),
    "test": ("probes.training", "scores of a checkpoint's probes, each of its best epoch; writes the run's files"),
    "sites": ("probes.inspection", "sites, grid, widths and attention of a model, without loading its weights"),
    "states": ("probes.inspection", "states of images to a safetensors file"),
    "knockout": ("probes.analyses.knockout", "attention knockout, Eq. 1, and how many wrong patches remain"),
    "starvation": ("probes.analyses.starvation", "accuracy by patch position, causal against bidirectional"),
    "umap": ("probes.analyses.umap", "patches of an image in two dimensions, by site (Fig. 5)"),
    "maps": ("probes.analyses.maps", "predicted segmentation of images, by site (Figs. 4, 13)"),
    "report": ("probes.report.page", "claims, figures and tables of runs as one HTML page"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command; `--help` behind it lists its options."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    command, arguments = argv[0], argv[1:]
    if command not in COMMANDS:
        sys.exit(f"probes: unknown command {command!r}\n\n{usage()}")
    module = import_module(COMMANDS[command][0])
    try:
        module.main(command, arguments)
    except ValueError as error:
        if not _raised_here(error):
            raise
        sys.exit(f"probes {command}: {error}")


def _raised_here(error: ValueError) -> bool:
    """Whether this package raised it: then it is about the user's input and says all; a bug keeps its traceback."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(Path(__file__).parent)


def usage() -> str:
    lines = ["usage: probes COMMAND [options]", "", "Where in an MLLM can its image tokens be segmented?", ""]
    lines += [f"  {name:<12} {help_text}" for name, (_, help_text) in COMMANDS.items()]
    return "\n".join([*lines, "", "probes COMMAND --help lists the options of a command."])
