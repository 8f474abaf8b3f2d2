"""Memory does not grow with records or with classes x sites x pixels; frozen weights are held once."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import probe_runs
import pytest
import tiny_models
import torch
from processes import run_command
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}:{ROOT / 'tests/bench'}"
    }
    return run_command([sys.executable, *command], cwd=ROOT, env=environment).stdout


@pytest.mark.nightly
def test_an_epoch_holds_no_record():
    """4,000 records of 1.4 KB: batches that are kept would be some 120 MB."""
    phases = json.loads(run("tests/bench/records.py", "--records", "4000", "--workers", "0"))
    assert phases["epoch"]["samples"] == 4096
    held = phases["epoch"]["held_mb"]
    assert held[-1] - held[0] < 40


PEAKS = """
import torch
from memory import peak_mb
from probes.ops.pixel_counts import count

torch.set_num_threads(1)
target = torch.randint(4, (16, 1024, 2048), dtype=torch.uint8)
logits = torch.randn(1, 16, 4, 24, 24)
count(logits, target[:, :64, :64])
print(peak_mb(lambda: count(logits, target)))
"""


def test_large_masks_are_processed_a_few_at_a_time():
    """Sixteen masks of 1024 x 2048 are 34 MB, 270 MB as 64-bit integers, and their logits 540 MB."""
    assert float(run("-c", PEAKS)) < 400


PROBES = """
import json, sys
from probes.cli import main

for command in json.loads(sys.argv[1]):
    main(command)
    print(next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_probe_run_makes_no_logits_of_full_size(checkpoints, tmp_path):
    """Six sites, 150 classes, two masks of 512 x 1024: all logits would be 3.8 GB."""
    commands = []
    for size in ((64, 128), (512, 1024)):
        root = tiny_models.write_segmentation(
            tmp_path / str(size[0]), training=2, validation=2, size=size
        )
        classes = {"classes": [f"class {k}" for k in range(150)], "ignore_index": 255}
        (root / "classes.json").write_text(json.dumps(classes))
        more = "--data.batch_size 2 --save_predictions true".split()
        commands.append(probe_runs.arguments(checkpoints["causal"], root, root / "run", *more))
    said = run("-c", PROBES, json.dumps(commands)).splitlines()
    small, large = (float(line) for line in said if re.fullmatch(r"[\d.]+", line))
    assert large - small < 500


# Only anonymous memory counts: pages of a mapped checkpoint are dropped when memory is short.
FROZEN_MODEL = """
import sys, threading, torch
from memory import memory_mb
from llava_bidir.model.lora import Lora
from llava_bidir.training.module import LlavaTraining
encoder, llm, lora = sys.argv[1:]
settings = {"lora": Lora(r=2), "trainable": ["adapter", "llm"]} if lora == "lora" else {"trainable": ["adapter"]}
module = LlavaTraining({"name": "clip", "path": encoder, "layer": -1}, llm, frozen_dtype="bfloat16", **settings)
before, peak, done = memory_mb("RssAnon"), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, memory_mb("RssAnon") - before)
thread = threading.Thread(target=watch, daemon=True); thread.start()
module.configure_model()
done.set(); thread.join(60)
print(peak, sum(p.nbytes for p in module.model.parameters()) / 2**20)
"""


@pytest.mark.parametrize("stage", ["adapter", pytest.param("lora", marks=pytest.mark.nightly)])
def test_frozen_weights_are_held_once_while_they_are_read(stage, parts, tmp_path):
    """77 million weights are 150 MiB in bfloat16; when all were read in fp32 first, the peak was 2.15 times that.

    What transformers' loading threads hold at a time depends on the machine's load: 1.1 to 1.33 times were seen.
    """
    shutil.copytree(parts[1], tmp_path / "llm")
    words = json.loads((tmp_path / "llm/config.json").read_text())["vocab_size"]
    size = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    }
    (tmp_path / "llm/model.safetensors").unlink()
    config = LlamaConfig(vocab_size=words, **size)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(
        tmp_path / "llm", max_shard_size="50MB"
    )
    command = ("-c", FROZEN_MODEL, parts[0].path, str(tmp_path / "llm"), stage)
    peak, weights = map(float, run(*command).split()[-2:])
    assert weights > 140 and peak < 1.7 * weights, peak / weights
