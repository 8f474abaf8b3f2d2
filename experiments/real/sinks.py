"""The first image token as an attention sink, and what cutting a sink off does to answers.

    python -m experiments.real.sinks MODEL PHOTOS --windows 4-10 11-20 21-30

Prints for the model as it is asked, and for an image without text before it, under both masks: the norm of the first
image token in medians of the image's tokens and the number of tokens with ten medians, at some layers. Then the mean
change of the log-probability of four answers, in nats, if all tokens are cut off from the prefix in windows of layers.
"""

import argparse
from pathlib import Path

import probes
from probes.analyses.sinks import IMAGES, measure_sinks
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.sites import layer_site

QUESTION = "What is in the picture?"
ANSWERS = ["a road", "a building", "a person", "a dog"]
SHOWN = 6  # layers


def print_sinks(mllm: FrozenMLLM, photos: list[Path], kind: str) -> None:
    """Print the norms of a model under both masks."""
    for mask in ("causal", "bidirectional"):
        layers = measure_sinks(mllm.with_attention(mask), photos)["layers"]
        step = -(-len(layers) // SHOWN)
        cells = []
        for layer in layers[step - 1 :: step]:
            cells.append(f"{layer['site']} {layer['first_norm']:.1f} ({layer['sinks']:.0f})")
        print(f"{kind}, {mask}: {', '.join(cells)}", flush=True)


def print_windows(mllm: FrozenMLLM, photos: list[Path], windows: list[tuple[int, int]]) -> None:
    """Print the change of answers by window."""
    pixels = mllm.preprocess(photos)
    plain = mllm.answer_log_probs(pixels, QUESTION, ANSWERS)
    rows = ("image", "question", "last", "answer")
    for first, last in [(1, len(mllm.layers)), *windows]:
        layers = list(range(first, last + 1))
        knockout = probes.Knockout(layers=layers, rows=rows, columns="prefix")
        changed = mllm.answer_log_probs(
            pixels, question=QUESTION, answers=ANSWERS, knockout=knockout
        )
        change = (changed - plain).mean()
        where = f"{layer_site(first)} to {layer_site(last)}"
        print(f"cut off from the prefix in {where}: {change:+.2f} nats", flush=True)


def window(text: str) -> tuple[int, int]:
    """Return the first and last layer of a window such as 4-10."""
    first, last = text.split("-")
    return int(first), int(last)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("photos", type=Path, help="a folder of photos")
    parser.add_argument("--windows", type=window, nargs="*", default=[], metavar="FIRST-LAST")
    options = parser.parse_args()
    photos = sorted(options.photos.iterdir())[:IMAGES]
    asked = probes.load(options.model)
    print_sinks(asked, photos, "after the prompt's prefix")
    print_sinks(probes.load(options.model, prefix=""), photos, "image first")
    print_windows(asked, photos, options.windows)


if __name__ == "__main__":
    main()
