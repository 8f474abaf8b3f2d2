"""Language of a model that was trained on the toy world: perplexity of a fixed text, answers and conversations.

Shapes: N tokens, V words of the language model's own vocabulary.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.real.world import CAPTION, KIND
from llava_bidir.commands.generate import answer, load_with_processor
from llava_bidir.common.hf import read_training
from llava_bidir.common.images import read_image

TEXT = """\
The harbour lies on the north side of the island, behind a long wall of grey stone. In summer a ferry brings \
visitors every morning, and most of them walk up the hill to see the old lighthouse before they eat lunch. Its \
keeper retired many years ago, and today a computer turns the light on when the sun goes down. From the gallery \
one can see the mainland, the two smaller islands to the west, and on clear days the mountains. Fishermen still \
leave before dawn, although there are fewer boats each year. They sell what they catch on the quay, where the \
cats of the village are waiting for them. When a storm is coming, the shops close early and everyone helps to \
pull the boats out of the water."""
CONVERSATIONS = 3


def describe_llm(path: Path, words: int) -> dict[str, Any]:
    """Return the perplexity of a language model, as :func:`describe_mllm` does."""
    llm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return {"perplexity": perplexity(llm, AutoTokenizer.from_pretrained(path), words)}


def describe_mllm(
    path: Path,
    words: int,
    questions: list[dict[str, Any]],
    images: Path,
    also_asked: Sequence[str] = (KIND, CAPTION),
) -> dict[str, Any]:
    """Return perplexity, answers and conversations of an exported model.

    Args:
        path: Exported directory, RUN/hf.
        words: V, those of the language model before images were added.
        questions: LLaVA's JSON of validation questions.
        images: Folder of their images.
        also_asked: Further questions of each conversation.

    Returns:
        {"perplexity", "first_layer_update", "answer_accuracy": share of `questions` that were answered exactly at the
        end of training, null if none were asked, "conversations": [{"image", "turns": [[question, answer, right
        answer or null]]}]}
    """
    model, processor = load_with_processor(str(path), "float32")
    shown = [
        read_image(images / record["image"]) for record in questions[:: max(1, len(questions) // 8)]
    ]
    description = {
        "perplexity": perplexity(model, processor.tokenizer, words),
        "first_layer_update": first_layer_update(model, processor, shown),
        "answer_accuracy": read_training(path).get("val/answer_accuracy"),
    }
    conversations = []
    for record in questions[:: max(1, len(questions) // CONVERSATIONS)][:CONVERSATIONS]:
        asked, right = (
            turn["value"].removeprefix("<image>\n") for turn in record["conversations"][:2]
        )
        texts = [asked, *also_asked]
        image = read_image(images / record["image"])
        said = answer(
            model,
            processor=processor,
            questions=texts,
            images=[[image]] * len(texts),
            max_new_tokens=40,
        )
        turns = list(zip(texts, said, (right, *[None] * len(also_asked)), strict=True))
        conversations.append({"image": record["image"], "turns": turns})
    return description | {"conversations": conversations}


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokenizer, words: int) -> float:
    """Return the perplexity of `TEXT`, with probabilities over the first `words` rows of the head only.

    The rows that training adds, for images and padding, would change the last bits.
    """
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    return math.exp(text_loss(model, ids, words).item())


@torch.no_grad()
def first_layer_update(model: torch.nn.Module, processor, images: list[Image.Image]) -> float:
    """Return how much the first layer changes image tokens, relative to their norm, as a mean over the tokens."""
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values
    ids = torch.full((len(images), model.config.image_seq_length), model.config.image_token_id)
    before, after, *_ = model(
        input_ids=ids, pixel_values=pixels, output_hidden_states=True, use_cache=False
    ).hidden_states
    updates = (after - before).norm(dim=-1)
    return (updates / before.norm(dim=-1)).mean().item()


def text_loss(model: torch.nn.Module, ids: Tensor, words: int) -> Tensor:
    """Return the mean cross-entropy of ids long[1, N] in nats per token."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1, :words]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:])


def format_description(name: str, entry: dict[str, Any]) -> str:
    """Return a description as lines of text."""
    lines = [f"{name}: perplexity {entry['perplexity']:.2f}"]
    if "first_layer_update" in entry:
        lines[0] += (
            f", the first layer changes image tokens by {entry['first_layer_update']:.1f} of their norm"
        )
    if entry.get("answer_accuracy") is not None:
        lines[0] += (
            f", {entry['answer_accuracy']:.1%} of held-out questions answered (50% without the picture)"
        )
    for conversation in entry.get("conversations", ()):
        lines.append(f"  {conversation['image']}")
        for question, said, right in conversation["turns"]:
            expected = ""
            if right is not None:
                expected = f" (right: {right})"
            lines.append(f"    {question}\n      {said!r}{expected}")
    return "\n".join(lines)
