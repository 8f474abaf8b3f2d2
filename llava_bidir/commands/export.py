"""`llava-bidir export`: convert a training checkpoint to a Hugging Face directory."""

import argparse
import logging

from llava_bidir.model.hf_export import as_llava, export_hf
from llava_bidir.training.read_checkpoint import read_checkpoint


def run(args: argparse.Namespace) -> None:
    """Run `llava-bidir export`.

    Raises:
        UserError: The file is not a checkpoint of `llava-bidir fit`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, processor, facts = read_checkpoint(args.checkpoint)
    if args.dtype == "float32":
        model.float()
    export_hf(as_llava(model) if args.as_llava else model, processor, args.out, facts)
    print(args.out)
