"""`llava-bidir export`: convert a training checkpoint to a Hugging Face directory."""

import logging

from llava_bidir.command_options import ExportOptions
from llava_bidir.model.hf_export import as_llava, export_hf
from llava_bidir.training.read_checkpoint import read_checkpoint


def run(options: ExportOptions) -> None:
    """Run `llava-bidir export`.

    Raises:
        UserError: The file is not a checkpoint of `llava-bidir fit`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, processor, facts = read_checkpoint(options.checkpoint)
    if options.dtype == "float32":
        model.float()
    export_hf(as_llava(model) if options.as_llava else model, processor, options.out, facts)
    print(options.out)
