"""How long training waits for a checkpoint of ZeRO-2: written at once, and in the background (`async_save`).

    python tests/bench/save.py

Both save the same model in turn, on one process. In the background, training waits for a copy in memory only. (On a CPU
the steps that follow are slower while it is written, because the thread that writes takes part of a core.)
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning import Callback, Trainer
from training import Batches, batches, random_model, write_parts

from llava_bidir.model.build import set_trainable
from llava_bidir.training.deepspeed_strategy import ZeRO
from llava_bidir.training.module import LlavaTraining

VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
LLM = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 16, "vocab_size": 4096}
SIZE = {"vision": VISION, "image_size": 112, "samples": 1, "text": 64, "llm": LLM}
PARTS = ["adapter", "llm"]


class Save(Callback):
    """Saves after each step and times how long the call takes; what is left in the background ends untimed."""

    def __init__(self, path: Path):
        self.path, self.waits = path, []

    def on_train_batch_end(self, trainer, *args, **kwargs):
        start = time.perf_counter()
        trainer.save_checkpoint(self.path)
        self.waits.append(time.perf_counter() - start)
        trainer.strategy.finish_save()


def time_saves(parts, rounds: int, path: Path, async_save: bool) -> list[float]:
    """Seconds that training waits for each save but the first."""
    module, save = LlavaTraining(*parts, trainable=PARTS, learning_rate=1e-4), Save(path)
    module.model = random_model(module, torch.device("cpu"))
    set_trainable(module.model, PARTS)
    data = Batches(batches(module.model, SIZE, rounds + 1), module.model.config.image_token_id)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "max_epochs": 1, **quiet}
    Trainer(strategy=ZeRO({"stage": 2}, async_save=async_save), callbacks=[save], **options).fit(
        module, datamodule=data
    )
    return save.waits[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of the LLM, 13 million weights each (16)")
    parser.add_argument("--rounds", type=int, default=3, help="saves of either (3)")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    for name in ("lightning.pytorch", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    beside = args.out.parent if args.out else Path()  # on a disk; /tmp may be memory
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside) as temporary:
        folder = Path(temporary)
        parts = write_parts(folder, SIZE | {"llm": LLM | {"num_hidden_layers": args.layers}})
        waits = {
            name: time_saves(parts, args.rounds, folder / "last.ckpt", name == "background")
            for name in ("at once", "background")
        }
        size = sum(file.stat().st_size for file in (folder / "last.ckpt").rglob("*")) / 1e9
    median = {name: statistics.median(seconds) for name, seconds in waits.items()}
    found = {"checkpoint_gb": size, "waits_s": waits, "ratio": median["at once"] / median["background"]}
    print(f"checkpoint of {size:.1f} GB; training waits")
    for name, seconds in waits.items():
        print(f"  {name:11} {median[name]:6.2f} s [{min(seconds):.2f}, {max(seconds):.2f}]")
    print(f"  {found['ratio']:.1f} x as long if written at once")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
