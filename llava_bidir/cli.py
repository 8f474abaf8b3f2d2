"""The `llava-bidir` command; the code of a command is imported when it runs."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import llava_bidir
from llava_bidir.command_options import COMMANDS
from llava_bidir.common import imports
from llava_bidir.common.command_table import add_commands, run_chosen
from llava_bidir.common.configs import with_config_paths
from llava_bidir.common.errors import one_line_errors
from llava_bidir.common.option_names import check_options
from llava_bidir.common.short_help import ShortHelp, show_short_help
from llava_bidir.common.usage_errors import ArgumentParser

OPTIONS = Path(__file__).with_name("options.txt")  # of the commands in HELP
REQUIRED = ("model.encoder.name", "model.encoder.path", "model.llm", "model.trainable")
REQUIRED += ("data.annotations", "data.images")
ABSENT = {  # where a user of LightningCLI looks
    "model": (
        "the model is always LlavaTraining, as which checkpoints and exports are read back. Its parts are options "
        "(--model.llm, --model.encoder, --model.lora), a mask is registered (llava_bidir.register_image_attention), "
        "and a training step of your own is a subclass in Python"
    ),
    "data": "data are always LLaVA's JSON and a folder of images, --data.annotations and --data.images",
    "optimizer": (
        "the optimizer is LLaVA's AdamW, with --model.learning_rate, --model.adapter_learning_rate, --model.betas and "
        "--model.weight_decay"
    ),
    "lr_scheduler": (
        "the learning rate rises in --model.warmup_ratio of the steps and falls as a cosine, as LLaVA's"
    ),
}
MODULES = {
    "verify-data": "llava_bidir.commands.verify_data",
}
DATA = {
    "-c NAME": "config by name or path; later ones replace the values of earlier ones",
    "--data.annotations FILE": "LLaVA's JSON with conversations",
    "--data.images DIR": "folder of the images",
}
TRAINING = DATA | {
    "--model.image_attention": "mask among image tokens: causal, bidirectional or prefix (default: causal)",
    "--model.llm DIR": "language model: directory or hub id",
    "--model.encoder.path DIR": "vision tower: directory or hub id",
    "--model.adapter DIR": "stage 2: the exported model of stage 1",
    "--trainer.devices N": "number of GPUs (default: auto)",
    "--out DIR": "folder of the run (default: runs/llava)",
    "--ckpt_path last": "resume an interrupted run, and leave a finished one alone",
    "--overwrite true": "replace the run that the folder holds (default: false)",
}
FIT = "llava-bidir fit -c stage1 -c clip -c zero2 --data.annotations blip_laion_cc_sbu_558k.json --data.images IMAGES"
OTHERS = ". All other options are those of `llava-bidir fit`"
HELP = {
    "fit": ShortHelp("Train a stage of LLaVA-1.5, and export the model to OUT/hf.", FIT, TRAINING),
    "validate": ShortHelp(
        "Compute loss and answers of a checkpoint on the validation questions. " + OTHERS[2:] + ".",
        "llava-bidir validate -c stage2 -c clip --model.image_attention causal --data.annotations mix.json "
        "--data.val_annotations questions.json --data.images IMAGES --out RUN --ckpt_path last",
        {"--data.val_annotations FILE": "validation questions", **DATA},
    ),
}
HELP["test"] = HELP["validate"]
HELP["verify-data"] = ShortHelp(
    "Check every record and image before using GPU time; exit with status 1 if any cannot be used"
    + OTHERS
    + ".",
    "llava-bidir verify-data -c stage2 -c clip --data.annotations mix.json --data.images IMAGES",
    DATA
    | {
        "--show I ...": "show tokens, labels and attention mask of these records instead",
        "--json": "print JSON",
    },
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; those in HELP, which take options of LightningCLI, parse their own."""
    parser = ArgumentParser(
        prog="llava-bidir",
        description="LLaVA-1.5 with or without bidirectional attention among image tokens (arXiv 2603.17228).",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {llava_bidir.__version__}"
    )
    parser.add_argument(imports.OPTION, metavar="FILE.py", help=imports.HELP)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, page in HELP.items():
        text = page.text.partition(". ")[0].removesuffix(".")
        commands.add_parser(name, help=text[0].lower() + text[1:], add_help=False)
    add_commands(commands, COMMANDS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: Invalid usage or input, with a message that says what was expected.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("llava-bidir", argv):
        argv = imports.take_imports("llava-bidir", argv)
        if argv[1:] == ["--version"]:
            argv = argv[1:]
        argv = show_short_help("llava-bidir", argv, HELP) if argv else argv
        if argv and argv[0] in HELP:
            argv = with_config_paths(argv)
            check_options(
                f"llava-bidir {argv[0]}",
                argv[1:],
                OPTIONS.read_text().split(),
                REQUIRED,
                ABSENT,
            )
            import_module(MODULES.get(argv[0], "llava_bidir.training.cli")).main(argv)
            return
        parser = build_parser()
        if not argv:
            parser.print_help(sys.stderr)
            sys.exit(2)
        args = parser.parse_args(argv)
        run_chosen(args)
