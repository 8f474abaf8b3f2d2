"""`llava-bidir export`: convert a training checkpoint to a Hugging Face directory."""

import logging
from pathlib import Path

from llava_bidir.command_options import ExportOptions
from llava_bidir.common.runs import newest_checkpoint
from llava_bidir.model.export import as_llava, export_hf
from llava_bidir.training.read_checkpoint import read_checkpoint

log = logging.getLogger(__name__)


def run(options: ExportOptions) -> None:
    """Run `llava-bidir export`.

    Raises:
        UserError: There is no checkpoint of `llava-bidir fit`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    checkpoint = find_checkpoint(options.source)
    model, processor, facts = read_checkpoint(checkpoint)
    log.info("exporting %s, which is after step %s", checkpoint, facts.get("steps"))
    if options.dtype == "float32":
        model.float()
    export_hf(as_llava(model) if options.as_llava else model, processor, options.out, facts)
    print(options.out)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint to export: `path`, or the newest valid one if it is the folder of a run.

    Raises:
        UserError: The run has no valid checkpoint.
    """
    if (path / "checkpoints").is_dir():
        return newest_checkpoint(path)
    if path.exists() and path.parent.name == "checkpoints":
        newest = newest_checkpoint(path.parents[1])
        if newest != path:
            log.warning(
                "%s is not the newest checkpoint of its run, which is %s", path, newest.name
            )
    return path
