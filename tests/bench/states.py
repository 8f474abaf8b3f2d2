"""Time of the states of all sites, by `probes` and by careful code on stock transformers.

`bench.py --only states` runs it. The model has random weights and the shape of real ones: a CLIP of 384 x 12 at 336 px,
an LLM of SmolLM2's 576 x 30, 576 image tokens. Each way is a process of one thread, which makes the model and counts
the CPU-seconds of the states alone.
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
        inputs = {"input_ids": IDS, "pixel_values": pixels, "use_cache": False}
        return model(**inputs, output_hidden_states=True).hidden_states

    return states


WAYS = {"probes": by_probes, "stock": by_stock}


@torch.inference_mode()
def print_seconds(way: str) -> None:
    """Print the CPU-seconds of the states of a batch, after one to warm up."""
    torch.set_num_threads(1)
    states = WAYS[way]()
    pixels = torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    states(pixels)
    before = time.process_time()
    states(pixels)
    print(time.process_time() - before)


def bench_states(rounds: int) -> dict:
    """Return the ratio of time of stock code over ours; both take turns."""
    seconds = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, seconds_of_way in seconds.items():
            line = last_line([sys.executable, __file__, way], OMP_NUM_THREADS=1)
            seconds_of_way.append(float(line))
    name = "states of all sites, an LLM of 30 layers x 576: stock code over probes"
    return {"name": name} | ratios(*seconds.values())


if __name__ == "__main__":
    print_seconds(sys.argv[1])
