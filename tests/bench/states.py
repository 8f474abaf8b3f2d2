"""Time of the states of all sites, by `probes`, by careful code on stock transformers and by nnsight.

`bench.py --only states [--nnsight PYTHON]` runs it. The model has random weights and the shape of real ones: a CLIP of
384 x 12 at 336 px, an LLM of SmolLM2's 576 x 30, 576 image tokens. Each way is a process of one thread, which makes the
model and counts the CPU-seconds of the states alone. PYTHON is that of an environment with torch, transformers and
nnsight; it may not have this project.
"""

import sys
import time
from collections.abc import Callable

import torch
import transformers
from measure import last_line, ratios

BATCH = 4
SIDE = 336
PREFIX = 5  # tokens before the image
IMAGE_TOKENS = 576
IMAGE_ID = 2047
IDS = torch.tensor([[1] * PREFIX + [IMAGE_ID] * IMAGE_TOKENS] * BATCH)  # a prefix and the image
ENCODER = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": 14,
}
LLM = {
    "vocab_size": 2048,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def make_model() -> torch.nn.Module:
    """Return a stock LLaVA with random weights."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**ENCODER),
        text_config=transformers.LlamaConfig(**LLM),
        image_token_index=IMAGE_ID,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def by_probes() -> Callable[[torch.Tensor], object]:
    """Return the states of all sites, as `probes` computes them, of pixels f[B, 3, px, px]."""
    from probes.models.families import FAMILIES
    from probes.models.frozen_mllm import FrozenMLLM

    mllm = FrozenMLLM(
        make_model(),
        FAMILIES["llava"],
        [transformers.CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)],
        [1] * PREFIX,
        "causal",
    )
    return mllm.states


def by_stock() -> Callable[[torch.Tensor], object]:
    """Return what a careful user of transformers writes: no head, no text after the image."""
    model = make_model().model

    def states(pixels: torch.Tensor) -> object:
        inputs = {
            "input_ids": IDS,
            "pixel_values": pixels,
            "use_cache": False,
        }
        return model(**inputs, output_hidden_states=True).hidden_states

    return states


def by_nnsight() -> Callable[[torch.Tensor], object]:
    """Return what nnsight saves of every layer's image tokens."""
    from nnsight import NNsight

    model = NNsight(make_model().model)

    def states(pixels: torch.Tensor) -> object:
        saved = []
        with model.trace(
            input_ids=IDS,
            pixel_values=pixels,
            use_cache=False,
        ):
            for layer in model.language_model.layers:
                saved.append(layer.output[..., PREFIX:, :].save())
        return saved

    return states


WAYS = {
    "probes": by_probes,
    "stock": by_stock,
    "nnsight": by_nnsight,
}


@torch.inference_mode()
def print_seconds(way: str) -> None:
    """Print the CPU-seconds of the states of a batch, after one to warm up."""
    torch.set_num_threads(1)
    states = WAYS[way]()
    pixels = torch.randn(
        BATCH,
        3,
        SIDE,
        SIDE,
        generator=torch.Generator().manual_seed(0),
    )
    states(pixels)
    before = time.process_time()
    states(pixels)
    print(time.process_time() - before)


def bench_states(nnsight: str | None, rounds: int) -> list[dict]:
    """Return the ratios of time of the other ways over ours, which take turns; `nnsight` is a Python that has it."""
    pythons = {"probes": sys.executable, "stock": sys.executable}
    if nnsight:
        pythons["nnsight"] = nnsight
    seconds = {way: [] for way in pythons}
    for _ in range(rounds):
        for way, python in pythons.items():
            line = last_line([python, __file__, way], OMP_NUM_THREADS=1)
            seconds[way].append(float(line))
    ours = seconds.pop("probes")
    name = "states of all sites, an LLM of 30 layers x 576: {} over probes"
    return [{"name": name.format(way)} | ratios(ours, found) for way, found in seconds.items()]


if __name__ == "__main__":
    print_seconds(sys.argv[1])
