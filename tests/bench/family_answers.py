"""A table of families: are answers, attention, knockouts and hooks those of the stock model?

    PYTHONPATH=tests/helpers python tests/bench/family_answers.py [FAMILY ...]

Tiny random models of the stock classes, float32, two images, two questions. A row has

    tokens      greedy answers, equal to those of the stock model's `generate` of both images at once
    logits      largest difference of the log-probabilities of two answers
    knockouts   the same under Eq. 1, text cut from the image, and the last token cut from the question, against the
                stock forward with the mask written out; the largest of their differences
    hooks       the same with states replaced at the adapter and in layer 2
    attention   largest difference of an answer's attention to the image from that of eager attention
    cached      answers with a cache are those without one, as they are and under each knockout and hook
    masks       forward, generate, and generate with a static cache have one mask; else the one that differs
"""

import argparse
import tempfile
from pathlib import Path

import tiny_families
import torch
from interventions import ANSWERS, HELLO, QUESTIONS, pictures, possible, spoken
from stock_answers import StockModel
from tiny_families import IMAGE_ID, STOCK

import probes
from probes.models.families import dynamic_resolution, gemma
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.measured_mask import RUNS

TOKENS = 4


def tokens_are_equal(name: str, mllm: FrozenMLLM) -> bool:
    """Return whether answers are those of the stock model's own generation."""
    images = pictures(name)
    stock = StockModel(name, mllm.model, images)
    for text, ids in QUESTIONS.items():
        expected = [spoken(tokens) for tokens in stock.generate(ids, TOKENS)]
        if mllm.answer(images, text, max_new_tokens=TOKENS) != expected:
            return False
    return True


def score_differences(name: str, mllm: FrozenMLLM) -> dict[str, float]:
    """Return the largest difference of log-probabilities by intervention."""
    images = pictures(name)
    stock = StockModel(name, mllm.model, images)
    pixels = mllm.preprocess(images)
    answers = mllm.chat.answer_ids(ANSWERS)
    differences = {}
    for kind, (arguments, change) in possible(name, len(images)).items():
        scores = torch.stack(
            [mllm.answer_log_probs(pixels, text, ANSWERS, **arguments) for text in QUESTIONS], 1
        )
        expected = [
            torch.stack([stock.score(question, answer, change) for answer in answers], -1)
            for question in QUESTIONS.values()
        ]
        differences[kind] = (scores - torch.stack(expected, 1)).abs().max().item()
    return differences


def attention_difference(name: str, mllm: FrozenMLLM) -> float:
    """Return the largest difference of an answer's attention to the image from that of eager attention."""
    images = pictures(name, 1)
    found = mllm.answer_attention(
        mllm.preprocess(images), "hello", "hellohello", average_heads=False
    )
    (answer,) = mllm.chat.answer_ids(["hellohello"])
    expected = StockModel(name, mllm.model, images).attention([HELLO], answer)
    return (torch.cat([*found.values()]) - expected).abs().max().item()


def cache_changes_nothing(name: str, mllm: FrozenMLLM) -> bool:
    """Return whether answers are those of forwards without a cache under each intervention."""
    images = pictures(name, 1)
    stock = StockModel(name, mllm.model, images)
    mllm.model.get_output_embeddings().weight.data[IMAGE_ID] = 0  # a placeholder is no text
    for arguments, change in possible(name, 1).values():
        answer = mllm.answer(images[0], "hello", max_new_tokens=TOKENS, **arguments)
        if answer != spoken(stock.generate_uncached([HELLO], TOKENS, change)):
            return False
    return True


def masks(mllm: FrozenMLLM) -> str:
    """Return "one", or what differs between a forward and a generation."""
    forward = mllm.measured_mask()
    for run in RUNS:
        if differences := forward.differences(mllm.measured_mask(run)):
            return f"{run}: {'; '.join(differences)}"
    return "one"


def row(name: str, folder: Path) -> str:
    """Return the row of a family."""
    mllm = probes.load(str(tiny_families.write(name, folder)), device="cpu", dtype="float32")
    mllm.chat.tokenizer.decode = lambda ids, **_: spoken(ids)
    scores = score_differences(name, mllm)
    hooked = max(value for kind, value in scores.items() if "patched" in kind)
    if STOCK[name].masks:
        cut = [value for kind, value in scores.items() if kind not in ("none", "patched")]
        knockouts = f"{max(cut):.0e}"
        attention = f"{attention_difference(name, mllm):.0e}"
    else:
        knockouts = attention = "no"
    cells = [
        "equal" if tokens_are_equal(name, mllm) else "DIFFER",
        f"{scores['none']:.0e}",
        knockouts,
        f"{hooked:.0e}",
        attention,
        masks(mllm),
        "equal" if cache_changes_nothing(name, mllm) else "DIFFER",
    ]
    return " | ".join([name, *cells])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    names = parser.parse_args().families or sorted(STOCK)
    dynamic_resolution.TOKENS_PER_SIDE = tiny_families.SIDE
    gemma.GEMMA4_TOKENS_PER_SIDE = tiny_families.SIDE
    print("family | tokens | logits | knockouts | hooks | attention | masks | cached", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(row(name, Path(folder) / name), flush=True)


if __name__ == "__main__":
    main()
