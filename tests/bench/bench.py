"""`make bench`: speed and memory as ratios, both sides measured in turn in one run.

Prints a table and writes JSON: {"machine": ..., "ratios": [{"name", "ours_s", "other_s", "ratio": [min, median, max],
...}]}. A ratio over 1 says how many times as long (or as much memory) the other way takes. Single times depend on the
machine and its load; the ratios of paired runs hardly do.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from data import bench_data
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from llava_bidir import LlavaBidirConfig, LlavaBidirForConditionalGeneration
from probes import upsampled_cross_entropy
from probes.families import FAMILIES
from probes.heads import Probe
from probes.mllm import FrozenMLLM
from probes.module import ProbeModule

PREFIX, TEXT, CLASSES, MASK_PX = 36, 64, 150, 256  # tokens before and after the image; classes and pixels of a mask


def paired(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> dict:
    """Times both in turn after one warm-up each."""
    times = ([], [])
    for i in range(rounds + 1):
        for function, seconds in zip((ours, other), times, strict=True):
            start = time.perf_counter()
            function()
            if i > 0:
                seconds.append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    return {
        "ours_s": statistics.median(times[0]),
        "other_s": statistics.median(times[1]),
        "ratio": [ratios[0], statistics.median(ratios), ratios[-1]],
    }


def loss_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits on LLaVA's grid and masks of ADE20K's size and classes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, CLASSES, 24, 24, generator=generator, requires_grad=True)
    target = torch.randint(0, CLASSES, (4, 512, 512), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return logits, target


def fused_loss(logits: torch.Tensor, target: torch.Tensor) -> None:
    upsampled_cross_entropy(logits, target).backward()


def torch_loss(logits: torch.Tensor, target: torch.Tensor) -> None:
    up = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    F.cross_entropy(up, target, ignore_index=255).backward()


def bench_loss(rounds: int) -> list[dict]:
    logits, target = loss_inputs()
    timed = paired(lambda: fused_loss(logits, target), lambda: torch_loss(logits, target), rounds)
    memory = [peak_memory_mb(name) for name in ("fused_loss", "torch_loss")]
    return [
        {"name": "upsampled cross-entropy, torch's over ours, time"} | timed,
        {
            "name": "upsampled cross-entropy, torch's over ours, peak memory",
            "ours_mb": memory[0],
            "other_mb": memory[1],
            "ratio": [memory[1] / memory[0]] * 3,
        },
    ]


def peak_memory_mb(loss: str) -> float:
    """How much more memory a process holds at most for one loss and its gradient; each in a process of its own."""
    command = [sys.executable, __file__, "--peak-memory", loss]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(loss: str) -> None:
    logits, target = loss_inputs()
    small = logits[:, :, :2, :2].detach().requires_grad_(), target[:, :8, :8]
    function = {"fused_loss": fused_loss, "torch_loss": torch_loss}[loss]
    function(*small)  # what the first call allocates for good
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory_kb("VmRSS")
    function(logits, target)
    print((memory_kb("VmHWM") - before) / 1024)


def memory_kb(kind: str) -> int:
    """Of this process, as Linux counts it: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))


def random_model(image_attention: str) -> LlavaBidirForConditionalGeneration:
    """LLaVA's layout at a size that two cores can time: 144 image tokens, 8 layers of width 512."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=168,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    )
    config = LlavaBidirConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=2047,
        image_seq_length=144,
        image_attention=image_attention,
    )
    return LlavaBidirForConditionalGeneration(config).eval()


def frozen_model() -> FrozenMLLM:
    model = random_model("bidirectional")
    return FrozenMLLM(model, FAMILIES["llava_bidir"], None, list(range(1, PREFIX + 1)), "bidirectional")


class Sweep:
    """Training steps of probes on a batch, with or without the frozen forward."""

    def __init__(self, images: int = 8):
        self.mllm = frozen_model()
        self.pixels = torch.randn(images, 3, 168, 168)
        self.target = torch.randint(0, CLASSES, (images, MASK_PX, MASK_PX))
        heads = {site: Probe(width, CLASSES, self.mllm.grid) for site, width in self.mllm.widths.items()}
        self.heads = nn.ModuleDict(heads)
        self.optimizers = {
            sites: torch.optim.AdamW([p for s in sites for p in heads[s].parameters()], fused=True)
            for sites in [tuple(heads), *((site,) for site in heads)]
        }

    def forward(self, sites=None) -> dict[str, torch.Tensor]:
        return self.mllm.states(self.pixels, sites)

    def step(self, sites: tuple[str, ...]) -> None:
        states = self.forward(sites)
        logits = torch.stack([self.heads[site](states[site]) for site in sites])
        logits = logits.transpose(-1, -2).unflatten(-1, self.mllm.grid)
        ProbeModule.losses(None, logits, self.target).sum().backward()
        self.optimizers[sites].step()
        self.optimizers[sites].zero_grad()


def bench_sweep(rounds: int) -> list[dict]:
    sweep = Sweep()
    sites = tuple(sweep.mllm.sites)

    def one_by_one() -> None:
        for site in sites:
            sweep.step((site,))

    return [
        {"name": f"{len(sites)} sites, one a pass over all in one pass"}
        | paired(lambda: sweep.step(sites), one_by_one, max(2, rounds // 2)),
        {"name": "probing sweep over the frozen forward alone"}
        | paired(sweep.forward, lambda: sweep.step(sites), rounds),
    ]


def bench_mask(rounds: int) -> list[dict]:
    """A training step of stage 2: everything but the encoder trains."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 2000, (4, PREFIX + 144 + TEXT), generator=generator)
    ids[:, PREFIX : PREFIX + 144] = 2047
    pixels = torch.randn(4, 3, 168, 168, generator=generator)

    def step_of(name: str) -> Callable[[], None]:
        model = random_model(name)
        model.model.vision_tower.requires_grad_(False)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < PREFIX + 144, -100)

        def step() -> None:
            model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss.backward()
            model.zero_grad()

        return step

    timed = paired(step_of("causal"), step_of("bidirectional"), rounds)
    return [{"name": "bidirectional over causal training step"} | timed]


def bench_text(rounds: int) -> list[dict]:
    """States of the image tokens, against the whole model on prefix, image and text as tools compute them."""
    mllm = frozen_model()
    pixels = torch.randn(8, 3, 168, 168)
    ids = torch.randint(1, 2000, (8, PREFIX + 144 + TEXT))
    ids[:, PREFIX : PREFIX + 144] = 2047

    @torch.no_grad()
    def whole() -> None:
        mllm.model(input_ids=ids, pixel_values=pixels, output_hidden_states=True, use_cache=False)

    timed = paired(lambda: mllm.states(pixels), whole, rounds)
    return [{"name": f"whole sequence ({PREFIX} + 144 + {TEXT} tokens) over image tokens only"} | timed]


BENCHES = {
    "loss": lambda args: bench_loss(args.rounds),
    "sweep": lambda args: bench_sweep(args.rounds),
    "mask": lambda args: bench_mask(args.rounds),
    "text": lambda args: bench_text(args.rounds),
    "data": lambda args: bench_data(args.records),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rounds", type=int, default=7, help="paired runs of each (7)")
    parser.add_argument(
        "--records", type=int, default=50_000, help="of the data path's (50,000); LLaVA's mix has 665,298"
    )
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="some of them (all)")
    parser.add_argument("--peak-memory", choices=["fused_loss", "torch_loss"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_memory:
        print_peak_memory(args.peak_memory)
        return
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    print(
        f"{machine['machine']}, torch {machine['torch']}, one thread; median of {args.rounds} paired runs [min, max]\n"
    )
    ratios = []
    for name in args.only:
        for entry in BENCHES[name](args):
            low, median, high = entry["ratio"]
            print(f"{median:7.2f}x  [{low:.2f}, {high:.2f}]  {entry['name']}", flush=True)
            ratios.append(entry)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
