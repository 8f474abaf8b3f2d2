"""`llava-bidir export`: a training checkpoint as a Hugging Face directory."""

import argparse

from llava_bidir.model.hf_export import as_llava, export_hf
from llava_bidir.training.read_checkpoint import read_checkpoint


def run(args: argparse.Namespace) -> None:
    """`llava-bidir export`.

    Raises:
        UserError: The checkpoint is none of `llava-bidir fit`, nor one of LLaVA's own code.
    """
    from .import_llava import is_original, read_original

    if is_original(args.checkpoint):
        model, processor, facts = read_original(args.checkpoint, args.encoder)
    else:
        model, processor, facts = read_checkpoint(args.checkpoint)
    export_hf(as_llava(model) if args.as_llava else model, processor, args.out, facts)
    print(args.out)
