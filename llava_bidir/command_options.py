"""The commands of `llava-bidir`, and the options of those that LightningCLI does not parse.

Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from llava_bidir.common.cli import Command, Count, positional

# vqa/scores.py needs numpy
BenchmarkName = Literal[
    "gqa", "mmbench", "mme", "mmmu", "pope", "scienceqa", "textvqa", "textvqa_ocr", "vizwiz"
]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `llava-bidir export`.

    Args:
        source: Folder of a run, whose newest complete checkpoint is exported, or one of its RUN/checkpoints/*.ckpt.
        out: Directory to write; replaces an earlier export.
        as_llava: Write a model of type llava for serving software; requires a causal model.
        trust: Run the code of the run's own mask, RUN/hf/attention.py; read it first.
        dtype: Dtype of the weights; auto: those of training, to which LoRA's updates are rounded.
    """

    source: Path = positional()
    out: Path = positional()
    as_llava: bool = False
    trust: bool = False
    dtype: Literal["auto", "float32"] = "auto"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `llava-bidir generate`.

    Args:
        model: Exported directory (RUN/hf), or a llava checkpoint of transformers.
        words: Photos, then questions about each of them; a single answer is streamed.
        max_new_tokens: Maximum number of tokens per answer.
        dtype: Dtype of the model; auto: the checkpoint's.
        trust: Run the code of a mask of the model's own, its attention.py; read it first.
    """

    model: str = positional()
    words: tuple[str, ...] = positional()
    max_new_tokens: Count = 256
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    trust: bool = False


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Options of `llava-bidir status`.

    Args:
        runs: Folder of the runs, with MODEL/stage1, MODEL/stage2, MODEL/vqa, studies and logs.
        json: Print the rows as JSON.
    """

    runs: Path = positional()
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class VQAOptions:
    """Options of `llava-bidir vqa`.

    Args:
        model: Exported directory (RUN/hf), or a llava checkpoint of transformers.
        out: Folder for the results; finished tasks are not run again.
        tasks: Benchmarks to run.
        data: Folder with copies of the data sets in ORG/NAME, for machines without a network.
        batch_size: Number of questions per batch on each device.
        devices: Number of processes, one per GPU.
        python: Python of the environment made by `make vqa-venv`.
    """

    model: str = positional()
    out: Path
    tasks: tuple[BenchmarkName, ...] = get_args(BenchmarkName)
    data: Path | None = None
    batch_size: Count = 1
    devices: Count = 1
    python: Path = Path(".venv-vqa/bin/python")


@dataclass(frozen=True, kw_only=True)
class VQATableOptions:
    """Options of `llava-bidir vqa-table`.

    Args:
        results: Result folders of `llava-bidir vqa`.
        out: Folder for table1.json and table1.csv.
    """

    results: tuple[Path, ...] = positional()
    out: Path


LIGHTNING = "llava_bidir.training.command:main"
COMMANDS = {
    "Train LLaVA-1.5": {
        "verify-data": Command(
            "llava_bidir.commands.verify_data:main",
            "encode every record and open every image before GPU time is used; options as for fit",
        ),
        "fit": Command(
            LIGHTNING, "train a stage, and export the model: -c stage1 -c clip -c zero2 --out RUN"
        ),
        "validate": Command(LIGHTNING, "loss and answers of a checkpoint; options as for fit"),
        "test": Command(LIGHTNING, "the same"),
        "status": Command(
            "llava_bidir.commands.status:run",
            "list how far the stages, studies and benchmarks in a folder are, and which jobs failed or died",
            StatusOptions,
        ),
    },
    "Use a trained model": {
        "export": Command(
            "llava_bidir.commands.export:run",
            "convert a training checkpoint to a Hugging Face directory",
            ExportOptions,
        ),
        "generate": Command(
            "llava_bidir.commands.generate:run", "answer questions about photos", GenerateOptions
        ),
    },
    "Compare models on benchmarks": {
        "vqa": Command(
            "llava_bidir.vqa.harness:run",
            "run the benchmarks of Table 1 with lmms-eval in its environment",
            VQAOptions,
        ),
        "vqa-table": Command(
            "llava_bidir.vqa.table1:run",
            "write Table 1 for several models with the paper's values and tests",
            VQATableOptions,
        ),
    },
}
