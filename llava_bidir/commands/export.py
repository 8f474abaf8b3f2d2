"""`llava-bidir export`: convert a training checkpoint to a Hugging Face directory."""

from llava_bidir.command_options import ExportOptions
from llava_bidir.common.errors import UserError
from llava_bidir.common.exported_masks import register_own_mask
from llava_bidir.common.files import read_json
from llava_bidir.common.runs import last_checkpoint
from llava_bidir.model.export import as_llava, export_hf
from llava_bidir.training.read_checkpoint import read_checkpoint


def run(options: ExportOptions) -> None:
    """Run `llava-bidir export`.

    Raises:
        UserError: There is no checkpoint of `llava-bidir fit`, or it has a mask that is not trusted.
    """
    checkpoint = options.source
    if (checkpoint / "config.json").is_file():
        raise UserError(
            f"{checkpoint} is an exported model; expected the folder of a run, or a checkpoint of it"
        )
    if (checkpoint / "checkpoints").is_dir():
        checkpoint = last_checkpoint(checkpoint / "checkpoints")
    if checkpoint is None or not checkpoint.exists():
        raise UserError(f"{options.source} is no checkpoint, and no folder of a run that has one")
    exported = checkpoint.parents[1] / "hf"
    if (exported / "config.json").is_file():
        config = read_json(exported / "config.json")
        register_own_mask(str(exported), config, trust=options.trust)
    model, processor, facts = read_checkpoint(checkpoint)
    if options.dtype == "float32":
        model.float()
    facts |= {"checkpoint": str(checkpoint)}
    export_hf(
        as_llava(model) if options.as_llava else model,
        processor=processor,
        out=options.out,
        training=facts,
    )
    print(options.out)
