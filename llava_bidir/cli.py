"""The `llava-bidir` command: all its options. What a command needs is imported when it runs."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from llava_bidir.common.errors import one_line_errors

TRAINING = {  # these take the options of LightningCLI
    "fit": "train a stage: -c configs/stage1.yaml -c configs/encoder/clip.yaml --model.image_attention bidirectional",
    "validate": "loss and answers of a checkpoint on the validation questions",
    "test": "the same as validate",
    "verify-data": "preflight of every record and image before GPU time: -c CONFIG [--decode] [--json FILE]",
    "estimate": "parameters, FLOPs and memory of a config, without weights: -c CONFIG [--devices N] [--json]",
    "inspect": "what the model is really fed: -c CONFIG [--index I ...] [--json]",
}
HOMES = {
    "inspect": "llava_bidir.commands.inspect_data",
    "estimate": "llava_bidir.commands.estimate",
    "verify-data": "llava_bidir.commands.verify_data",
}
VQA = "gqa mmbench mme mmmu pope scienceqa textvqa textvqa_ocr vizwiz toy".split()  # vqa/benchmarks.py needs numpy


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-bidir",
        description="LLaVA-1.5 with or without bidirectional attention among image tokens (arXiv 2603.17228).",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)

    def command(name: str, run: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        return added

    export = command("export", "llava_bidir.commands.export:run", "a training checkpoint to a Hugging Face directory")
    export.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="RUN/checkpoints/*.ckpt, or a directory that LLaVA's own code wrote",
    )
    export.add_argument("out", type=Path, metavar="OUT", help="directory; an earlier export is replaced")
    export.add_argument(
        "--encoder", metavar="PATH", help="CLIP of a checkpoint of LLaVA's own code (the one that its config names)"
    )
    export.add_argument(
        "--as-llava", action="store_true", help="as transformers' own llava, for serving software; causal models only"
    )

    generate = command("generate", "llava_bidir.commands.generate:run", "answers about an image, greedily")
    generate.add_argument("model", help="exported directory (RUN/hf), or a llava checkpoint of transformers")
    generate.add_argument("image", type=Path, help="image file")
    generate.add_argument("prompt", nargs="+", help="questions; one is answered as it is written, several as a batch")
    generate.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (256)")

    vqa = command("vqa", "llava_bidir.vqa.run:run", "Table 1's benchmarks through lmms-eval, in its own environment")
    vqa.add_argument("model", help="exported directory (RUN/hf), or a llava checkpoint of transformers")
    vqa.add_argument("--out", type=Path, required=True, help="folder; what is finished there is not run again")
    vqa.add_argument(
        "--tasks", nargs="+", choices=VQA, default=VQA[:-1], metavar="TASK", help=f"of {', '.join(VQA)} (all but toy)"
    )
    vqa.add_argument("--batch-size", type=int, default=1, help="questions at a time, on each device (1)")
    vqa.add_argument("--devices", type=int, default=1, help="processes, one for each GPU (1)")
    vqa.add_argument(
        "--data", type=Path, help="folder with the data sets in folders named as on the hub, ORG/NAME, instead of it"
    )
    vqa.add_argument(
        "--max-invalid-rate",
        type=float,
        default=0.05,
        help="largest share of answers that may be empty, or no letter, yes or no where one is asked for (0.05)",
    )
    vqa.add_argument(
        "--python", type=Path, default=Path(".venv-vqa/bin/python"), help="of the environment that make vqa-venv makes"
    )

    table = command(
        "vqa-table", "llava_bidir.vqa.table1:run", "Table 1 of several models, beside the paper's, with tests"
    )
    table.add_argument("results", nargs="+", type=Path, help="folders of finished `llava-bidir vqa`")
    table.add_argument("--out", type=Path, required=True, help="folder for table1.json, .csv, .tex and .html")

    assets = command(
        "demo-assets", "llava_bidir.toy_world.assets:run", "the toy world on disk, in the real data's formats"
    )
    assets.add_argument("out", type=Path, help="folder; an earlier world is replaced as a whole")
    assets.add_argument("--seed", type=int, default=0, help="decides everything that is drawn (0)")
    assets.add_argument(
        "--scale", type=float, default=1.0, help="share of the pictures, conversations and training steps (1.0)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command.

    Raises:
        SystemExit: Bad usage or bad input, with a message that says what was expected.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("llava-bidir"):
        if argv and argv[0] in TRAINING:
            import_module(HOMES.get(argv[0], "llava_bidir.training.cli")).main(argv)
            return
        args = build_parser().parse_args(argv)
        module, _, function = args.run.partition(":")
        getattr(import_module(module), function)(args)
