"""A sink is planted in the toy world, and no starvation: is the claim without this token rejected?

    python -m experiments.toy.planted_sink DEMO OUT

DEMO is a folder of `probes demo`. The causal model of its stage 2, in which nothing is planted, is trained to write one
large vector at the first image token from a layer on, whatever the image shows, and to keep the states of all other
image tokens. A study compares it with the bidirectional model of stage 2. Accuracy of patch 0 must then be worse under
causal attention, and that of the rest of its row not.

Prints the first token's norm by layer and the claims about starvation.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

import probes
from probes.analyses.sinks import measure_sinks
from probes.models.frozen_mllm import FrozenMLLM
from probes.worlds.plant import read_pictures
from probes.worlds.tiny_models import train

SINK_LAYER = 1
NORM = 40.0  # of the sink, in medians of the image's tokens
SITES = ["adapter", "layer_01", "layer_02", "layer_03", "layer_04"]
ARMS = ["trained", "random0", "random1", "random2", "permuted0", "permuted1"]


def train_sink(mllm: FrozenMLLM, pixels: Tensor, steps: int) -> None:
    """Train the LLM's layers to write a sink at the first image token after `SINK_LAYER`, and to keep the others."""
    reads = mllm.layers[SINK_LAYER - 1 :]
    layers = mllm.layers.requires_grad_(True)
    before = {site: mllm.states(pixels, [site])[site] for site in SITES[SINK_LAYER:]}
    median = before[SITES[SINK_LAYER]].norm(dim=-1).median()
    sink = torch.zeros(mllm.widths["adapter"])
    sink[0] = NORM * median
    read: list[Tensor] = []
    handles = []
    for layer in reads:
        handle = layer.register_forward_hook(lambda module, args, output: read.append(output))
        handles.append(handle)

    def loss() -> Tensor:
        chosen = torch.randint(len(pixels), (32,))
        is_image = mllm.is_image.expand(len(chosen), -1)
        inputs = mllm.family.inputs(mllm.model, pixels[chosen], is_image)
        read.clear()
        mllm.model.model(input_ids=mllm.ids.expand(len(chosen), -1), use_cache=False, **inputs)
        total = torch.zeros(())
        for states, states_before in zip(read, before.values(), strict=True):
            image = states[:, mllm.image_positions]
            moved = image[:, 1:] - states_before[chosen][:, 1:]
            changes = moved.square().sum(-1) / median**2
            missed = image[:, 0] - sink
            misses = missed.square().sum(-1) / sink.square().sum()
            total = total + changes.mean() + misses.mean()
        return total

    train([*layers.parameters()], loss, steps, "LLM with a sink", betas=(0.9, 0.999), floor=0.0)
    layers.requires_grad_(False)
    for handle in handles:
        handle.remove()


def main() -> None:
    """Plant the sink, study it, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    options = parser.parse_args()
    torch.manual_seed(0)
    source = {mask: options.demo / mask / "stage2/hf" for mask in ("causal", "bidirectional")}
    mllm = probes.load(str(source["causal"]), device="cpu", dtype="float32")
    pixels, _ = read_pictures(options.demo / "assets/llava", "training")
    planted = options.out / "causal"
    train_sink(mllm, pixels, options.steps)
    shutil.copytree(source["causal"], planted)
    mllm.model.save_pretrained(planted)
    photos = sorted((options.demo / "assets/segmentation/images/validation").iterdir())[:8]
    sinks = measure_sinks(probes.load(str(planted), device="cpu"), photos)
    for layer in sinks["layers"]:
        print(f"{layer['site']}: first image token {layer['first_norm']:.1f} medians")
    study = probes.study(
        source | {"causal": planted},
        options.demo / "assets/segmentation",
        out=options.out / "study",
        arms=options.arms,
        only=["solve", "sinks", "report"],
        options={"model": {"sites": SITES}},
    )
    print(study)


if __name__ == "__main__":
    main()
