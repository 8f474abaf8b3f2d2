"""Stage 2 on samples as long as those of LLaVA's mix: samples/s beside transformers' Trainer, and what each part adds.

    python tests/bench/mix.py              a small model, on any machine
    python tests/bench/mix.py --size 7b    CLIP ViT-L/14 at 336 px and Vicuna-7B's shapes, on a GPU

Every side trains the same samples for an epoch, with the same weights, micro-batches of 16, precision and gradient
checkpointing. The sides take turns, and the fastest round of each counts, since other work on the machine only slows
them. On a CPU, the seconds are those of this process.

The samples are those of `records.py`, a stand-in for the 665K mix with its share of text-only samples, several turns,
and short and long answers. For the small model, text is shortened as much as the image is (64 tokens for 576), and the
vocabulary has the share of the parameters that it has at 7B. Padding, attention and head then cost what they do at 7B.
"""

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning import Callback, LightningDataModule, Trainer
from records import _record
from torch.utils.data import DataLoader
from training import SIZES, random_model, stock_arguments, write_parts
from transformers import Trainer as StockTrainer
from transformers import TrainerCallback

from llava_bidir.data.batch_samplers import BatchSampler
from llava_bidir.data.collate import Collate, pad
from llava_bidir.data.conversation import IGNORE_INDEX, SYSTEM
from llava_bidir.model.build import set_trainable
from llava_bidir.model.hf_export import as_llava
from llava_bidir.training.module import LlavaTraining

BATCH, MICRO_BATCH, MAX_LENGTH, IMAGE_TOKENS = 64, 16, 2048, 576
TRAIN = ["adapter", "llm"]
LLM = {"small": SIZES["small"]["llm"] | {"vocab_size": 256}, "7b": SIZES["7b"]["llm"]}
STOCK = {"Trainer": "random", "Trainer, group_by_length": "group_by_length"}
OURS = {  # grouped by length, mask
    "ours, random order": (False, "causal"),
    "ours, grouped as LLaVA": (True, "causal"),
    "ours, grouped as LLaVA, bidirectional": (True, "bidirectional"),
}


def draw_samples(count: int, image_tokens: int, image_id: int) -> list[dict]:
    """Return samples {"input_ids", "labels", "words", "image"} with random ids."""
    py, generator = random.Random(0), torch.Generator().manual_seed(0)
    return [_draw_sample(_record(i, py), image_tokens, image_id, generator) for i in range(count)]


def _draw_sample(record: dict, image_tokens: int, image_id: int, generator: torch.Generator) -> dict:
    shorten = lambda tokens: max(1, round(tokens * image_tokens / IMAGE_TOKENS))
    turns = [(turn["from"] == "gpt", len(turn["value"].split())) for turn in record["conversations"]]
    supervised = [False] * shorten(len(SYSTEM.split()))
    for is_answer, words in turns:
        supervised += [is_answer] * shorten(words + 3)  # with its role or its end
    ids = torch.randint(3, 100, (len(supervised),), generator=generator).tolist()
    labels = [token if trains else IGNORE_INDEX for token, trains in zip(ids, supervised, strict=True)]
    image = [image_id] * image_tokens if "image" in record else []
    end = MAX_LENGTH * image_tokens // IMAGE_TOKENS
    return {
        "input_ids": (image + ids)[:end],
        "labels": ([IGNORE_INDEX] * len(image) + labels)[:end],
        "words": sum(words for _, words in turns),
        "image": len(image) > 0,
    }


def random_pixels(samples: list[dict], image_px: int) -> torch.Tensor | None:
    images = sum(sample["image"] for sample in samples)
    return torch.randn(images, 3, image_px, image_px) if images else None


class DrawnCollate(Collate):
    """Our collation, of drawn samples."""

    def __init__(self, processor, image_tokens: int, image_px: int):
        super().__init__(processor, image_tokens, "vicuna_v1", MAX_LENGTH)
        self.image_px = image_px

    def __call__(self, samples: list[dict]) -> dict:
        return super().__call__([sample | {"id": ""} for sample in samples])

    def encode(self, sample: dict) -> tuple[list[int], list[int]]:
        return sample["input_ids"], sample["labels"]

    def pixels(self, samples: list[dict], rows: list[list[int]]) -> torch.Tensor | None:
        return random_pixels(samples, self.image_px)


class DrawnData(LightningDataModule):
    """Our sampler and collation, of drawn samples."""

    def __init__(self, samples: list[dict], collate: DrawnCollate, grouped: bool):
        super().__init__()
        self.samples, self.collate, self.grouped = samples, collate, grouped
        self.seed, self.batch_size, self.steps_per_epoch = 0, BATCH, len(samples) // BATCH

    def train_dataloader(self) -> DataLoader:
        lengths = [sample["words"] if sample["image"] else -sample["words"] for sample in self.samples]
        sampler = BatchSampler(lengths, BATCH, MICRO_BATCH, grouped=self.grouped)
        return DataLoader(self.samples, batch_sampler=sampler, collate_fn=self.collate)


def ours(module: LlavaTraining, data: DrawnData, precision: str, device: torch.device) -> float:
    """Return the seconds of an epoch through Lightning."""
    clock = Epoch(device)

    class Clocked(Callback):
        def on_train_epoch_start(self, *args):
            clock.start()

        def on_train_epoch_end(self, *args):
            clock.stop()

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,
        accumulate_grad_batches=BATCH // MICRO_BATCH,
        callbacks=[Clocked()],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(module, datamodule=data)
    return clock.seconds


def stock(model, samples: list[dict], strategy: str, image_px: int, precision: str, device: torch.device) -> float:
    """Return the seconds of an epoch through transformers' Trainer."""
    clock = Epoch(device)

    class Clocked(TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            clock.start()

        def on_epoch_end(self, *args, **kwargs):
            clock.stop()

    def collate(drawn: list[dict]) -> dict:
        batch = {"input_ids": pad([sample["input_ids"] for sample in drawn], 0)}
        batch["labels"] = pad([sample["labels"] for sample in drawn], IGNORE_INDEX)
        batch["attention_mask"] = pad([[1] * len(sample["input_ids"]) for sample in drawn], 0)
        pixels = random_pixels(drawn, image_px)
        return batch if pixels is None else {**batch, "pixel_values": pixels}

    with tempfile.TemporaryDirectory() as folder:
        arguments = stock_arguments(
            Path(folder),
            precision,
            device,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=BATCH // MICRO_BATCH,
            train_sampling_strategy=strategy,
            num_train_epochs=1,
        )
        StockTrainer(model, arguments, collate, samples, callbacks=[Clocked()]).train()
    return clock.seconds


class Epoch:
    """Seconds between two calls: of the GPU, or of the CPU in this process, which others take wall time from."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0

    def start(self) -> None:
        self.seconds = -self._now()

    def stop(self) -> None:
        self.seconds += self._now()

    def _now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def run_side(name: str, parts: tuple, size: dict, samples: int, precision: str, device: torch.device) -> float:
    """Return the samples/s of one side on a new model with the same weights."""
    grouped, mask = OURS.get(name, (False, "causal"))
    module = LlavaTraining(*parts, trainable=TRAIN, image_attention=mask, gradient_checkpointing=True)
    model, px, tokens = random_model(module, device), size["image_size"], module.image_tokens
    drawn = draw_samples(samples, tokens, model.config.image_token_id)
    if name in STOCK:
        model = as_llava(model)
        set_trainable(model, TRAIN)
        return samples / stock(model, drawn, STOCK[name], px, precision, device)
    set_trainable(model, TRAIN)
    model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    module.model = model
    collate = DrawnCollate(module.processor, tokens, px)
    return samples / ours(module, DrawnData(drawn, collate, grouped), precision, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--samples", type=int, default=256, help=f"of an epoch, a multiple of {BATCH} (256)")
    parser.add_argument("--rounds", type=int, default=3, help="how often every side is timed (3)")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, size = ("bf16-mixed" if device.type == "cuda" else "32-true"), SIZES[args.size]
    rates = {name: [] for name in (*STOCK, *OURS)}
    with tempfile.TemporaryDirectory() as folder:
        parts = write_parts(Path(folder), size | {"llm": LLM[args.size]})
        for name in ("Trainer", "ours, grouped as LLaVA"):  # both libraries' first steps
            run_side(name, parts, size, BATCH, precision, device)
        for _ in range(args.rounds):
            for name, measured in rates.items():
                measured.append(run_side(name, parts, size, args.samples, precision, device))
                print(f"{name:42} {measured[-1]:9.1f}", flush=True)
    fastest = {name: max(measured) for name, measured in rates.items()}
    ratio = {name: {other: rate / fastest[other] for other in STOCK} for name, rate in fastest.items()}
    print(f"{args.size} model on {device}, {precision}, fastest of {args.rounds} rounds of {args.samples} samples")
    print(f"{'':42} samples/s   x Trainer   x Trainer with group_by_length")
    for name, rate in fastest.items():
        print(f"{name:42} {rate:9.1f}   {'   '.join(f'{x:9.2f}' for x in ratio[name].values())}")
    result = {"device": str(device), "precision": precision, "samples_per_s": rates, "ratio": ratio}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
