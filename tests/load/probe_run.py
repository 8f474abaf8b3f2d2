"""A probe run of a deep model on large masks: the most memory that each of its steps takes.

    python tests/load/probe_run.py --layers 32 --classes 150 --size 1024 2048 --images 4 --batch-size 2

Prints JSON: by step of `probes fit`, and for `knockout` and `maps`, the peak over what the process held before it, in
MB, beside what the logits of all sites would take at the masks' own resolution. The model is as deep as LLaVA-1.5's and
has as many tokens, but is narrow: its states are not what is measured. Masks are tiles of random classes.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import numpy as np
import tiny_models
import torch
from lightning import Callback
from memory import forget_peak, memory_mb, peak_mb
from PIL import Image
from transformers import CLIPVisionModel, LlamaForCausalLM

from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.hf_export import export_hf
from llava_bidir.toy_world.tiny_models import train_tokenizer
from probes.cli import main as probes
from probes.training.cli import build_cli

TILES = 16  # a mask has as many by as many


def write_checkpoint(folder: Path, layers: int) -> Path:
    """A narrow model with LLaVA-1.5's 24 x 24 tokens."""
    torch.manual_seed(0)
    vision = tiny_models.vision_config()
    vision.image_size, vision.patch_size = 336, 14
    CLIPVisionModel(vision).save_pretrained(folder / "encoder")
    tokenizer = train_tokenizer(["USER: name the sky and a wall of this road ASSISTANT:\n"] * 3, folder / "llm")
    text = tiny_models.llama_config(
        len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    text.num_hidden_layers, text.max_position_embeddings = layers, 1024
    LlamaForCausalLM(text).save_pretrained(folder / "llm")
    encoder = Encoder("clip", str(folder / "encoder"), layer=-1)
    processor = build_processor(encoder, str(folder / "llm"))
    export_hf(build_model(encoder, str(folder / "llm"), processor), processor, folder / "hf", {})
    return folder / "hf"


def write_masks(root: Path, images: int, classes: int, size: tuple[int, int]) -> Path:
    """`images` for training and as many for validation, as a folder dataset."""
    tiny_models.write_segmentation(root, 0, 0)
    names = {"classes": [f"class {k}" for k in range(classes)], "ignore_index": 255}
    (root / "classes.json").write_text(json.dumps(names))
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for i in range(images):
            tiles = Image.fromarray(rng.integers(0, classes, (TILES, TILES), np.uint8))
            picture = Image.fromarray(rng.integers(0, 255, (TILES, TILES, 3), np.uint8))
            tiles.resize(size[::-1], Image.Resampling.NEAREST).save(root / f"annotations/{split}/{i:03d}.png")
            picture.resize(size[::-1]).save(root / f"images/{split}/{i:03d}.png")
    return root


class Peaks(Callback):
    """By step the most that any of its batches raised this process's memory by, callbacks included."""

    def __init__(self):
        self.mb: dict[str, float] = {}

    def _begin(self, *_) -> None:
        forget_peak()
        self.before = memory_mb("VmRSS")

    def _end(self, step: str) -> None:
        self.mb[step] = max(self.mb.get(step, 0.0), round(memory_mb("VmHWM") - self.before, 1))

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = _begin

    def on_train_batch_end(self, *_) -> None:
        self._end("training step")

    def on_validation_batch_end(self, *_) -> None:
        self._end("validation step, with maps for TensorBoard")

    def on_test_batch_end(self, *_) -> None:
        self._end("test step, with saved predictions")
        self._begin()

    def on_test_end(self, *_) -> None:
        self._end("scores, intervals and files of the run")


def fit(checkpoint: Path, root: Path, out: Path, batch_size: int) -> dict[str, float]:
    """`probes fit` for one epoch."""
    arguments = ["-c", "configs/demo/probes.yaml", "--model.mllm", str(checkpoint), "--data.root", str(root)]
    arguments += ["--out", str(out), "--data.batch_size", str(batch_size), "--data.cache_features", "false"]
    cli = build_cli([*arguments, "--trainer.max_epochs", "1", "--save_predictions", "true"], run=False)
    cli.trainer.callbacks.append(peaks := Peaks())
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return peaks.mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 2048], metavar=("H", "W"))
    parser.add_argument("--images", type=int, default=4, help="of each split")
    parser.add_argument("--batch-size", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        root, run = Path(folder), Path(folder) / "run"
        data = write_masks(root / "data", args.images, args.classes, args.size)
        peaks = fit(write_checkpoint(root, args.layers), data, run, args.batch_size)
        shown = ["--probes", str(run), "--image"]
        peaks["knockout"] = peak_mb(lambda: probes(["knockout", "--probes", str(run), "--classes", "auto:3"]))
        peaks["maps of one image"] = peak_mb(lambda: probes(["maps", *shown, "0"]))
        sites = len(json.loads((run / "metrics.json").read_text())["sites"])
    logits = 4e-6 * sites * args.batch_size * args.classes * args.size[0] * args.size[1]
    print(json.dumps(vars(args) | {"sites": sites, "peak_mb": peaks, "all_logits_mb": round(logits)}, indent=1))


if __name__ == "__main__":
    main()
