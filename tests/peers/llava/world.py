"""A tiny Vicuna, a tiny CLIP, pictures and 1,600 records for each stage, which both programs read."""

import json
import random
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
import tiny_models
from llama_tokenizers import write_tokenizer

from llava_bidir.common.tokenizer import load_tokenizer
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.export import export_hf

RECORDS = 1600
TEXT_ONLY = 404  # neither count is a multiple of 8: the last batch mixes them
VOCABULARY = 1024
SPARE_ROWS = 64  # into which <image> and <pad> go, so that neither program adds rows to its softmax
WIDTH = 64
SIDE_PX = 28
PATCH_PX = 7
MAX_LENGTH = 192  # longer records are cut

COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 200),
    "yellow": (220, 200, 50),
    "white": (240, 240, 240),
    "black": (15, 15, 15),
}
SIZES = [(40, 28), (28, 40), (56, 20), (20, 56), (33, 33), (28, 28), (61, 47)]
# Passages of prose, in words that the tokenizer knows.
PROSE = [
    " ".join(part.split())
    for text in topics.values()
    for part in text.split("\n\n")
    if 200 < len(part) < 900 and "<" not in part and "ASSISTANT" not in part
]


class Writer:
    """Write pictures and records from one source of random numbers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.random = random.Random(0)
        self.noise = np.random.default_rng(0)
        (folder / "pictures").mkdir(parents=True)

    def picture(self, index: int) -> tuple[str, str, str]:
        """Draw a disc on a ground and return the picture's path and both colours."""
        ground, disc = self.random.sample(sorted(COLOURS), 2)
        width, height = self.random.choice(SIZES)
        y, x = np.mgrid[:height, :width]
        radius = min(width, height) // 3
        inside = (x - width // 2) ** 2 + (y - height // 2) ** 2 < radius**2
        pixels = np.where(inside[..., None], COLOURS[disc], COLOURS[ground])
        pixels = pixels + self.noise.integers(-12, 13, pixels.shape)
        path = f"pictures/{index:04}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(self.folder / path)
        return path, ground, disc

    def prose(self, words: int) -> str:
        """Return the first words of a passage."""
        return " ".join(self.random.choice(PROSE).split()[:words])

    def caption(self, index: int) -> dict:
        """Return a record of stage 1; one in ten is longer than the limit."""
        path, ground, disc = self.picture(index)
        text = f"A {disc} disc on a {ground} ground."
        if index % 3 == 0:
            text += " " + self.prose(150 if index % 10 == 0 else 12)
        return self.record(index, ["<image>\nDescribe it.", text], path)

    def dialogue(self, index: int) -> dict:
        """Return a record of stage 2 of the kind that its index selects."""
        if index >= RECORDS - TEXT_ONLY:
            turns = [self.prose(5 + i % 9) for i in range(2 * self.random.randint(1, 4))]
            if index % 13 == 0:
                turns[1] = " ".join(self.prose(150) for _ in range(2))
            return self.record(index, turns)
        path, ground, disc = self.picture(index)
        facts = [
            ("Which colour has the disc?", disc),
            ("Which colour has the ground?", ground),
            ("What is in the picture?", f"A {disc} disc on a {ground} ground."),
            ("Is the disc red?", "yes" if disc == "red" else "no"),
            (self.prose(8), self.prose(10)),
            ('Wie heißt „猫"?', "naïve — 猫 😀"),
        ]
        asked = self.random.sample(facts, self.random.randint(1, 5))
        turns = [text for pair in asked for text in pair]
        question = turns[0]
        turns[0] = {
            0: f"{question}\n<image>",
            1: f"Look: <image> {question}",
            2: f"<image><image>\n{question}",
        }.get(index % 10, f"<image>\n{question}")
        if index % 17 == 0:
            turns[-1] = self.prose(150)  # past the limit
        record = self.record(index, turns, path)
        if index % 19 == 0:  # both drop an answer that nobody asked for
            record["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
        return record

    @staticmethod
    def record(index: int, turns: list[str], image: str | None = None) -> dict:
        """Return LLaVA's JSON of a dialogue."""
        record = {"id": str(index), "conversations": tiny_models.turns(*turns)}
        return record if image is None else record | {"image": image}


def break_every_40th(dialogues: list[dict]) -> list[dict]:
    """Return the dialogues with 40 of them as LLaVA's count of tokens loses them ("tokenization mismatch")."""
    broken = json.loads(json.dumps(dialogues))
    for i, record in enumerate(broken[::40]):
        turns = record["conversations"]
        if i % 3 == 0:
            turns.append({"from": "human", "value": "And why?"})  # which nobody answers
        elif i % 3 == 1:
            turns[-1]["value"] = ""
        else:
            turns[-2]["value"] += " ASSISTANT: is a word."
    return broken


def write_encoder(folder: Path) -> None:
    """Write a random CLIP whose weights bfloat16 and float16 hold exactly: LLaVA converts its encoder."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE_PX,
        patch_size=PATCH_PX,
        projection_dim=32,
    )
    tower = CLIPVisionModel(config)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.ndim > 1 and "layers" in name:
                parameter.mul_(6)  # so that its features depend on the pixels
            rounded = parameter.bfloat16().float()
            parameter.copy_(rounded.where(rounded.abs() > 2.0**-14, 0))
    tower.config.save_pretrained(folder)
    # as OpenAI's: transformers 5 would leave out the prefix, and 4 then draws all weights
    weights = {f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    size = {"height": SIDE_PX, "width": SIDE_PX}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE_PX}, crop_size=size).save_pretrained(folder)


def write_llm(folder: Path, records: list[dict], rows: int) -> None:
    """Write a Llama that has learned the words of the records for a while, and knows no image."""
    tokenizer = load_tokenizer("llm", str(folder))
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=rows,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    llm = LlamaForCausalLM(config)
    answers = [turn["value"] for record in records for turn in record["conversations"][1::2]]
    optimizer = torch.optim.AdamW(llm.parameters(), lr=3e-3)
    order = random.Random(3)
    for _ in range(150):
        texts = [tokenizer.encode(text)[:48] for text in order.sample(answers, 16)]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        labels = ids.masked_fill(ids == 0, -100)
        llm(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.copy_(parameter.bfloat16())
    llm.save_pretrained(folder)


def write_adapter(folder: Path, encoder: str, llm: str) -> None:
    """Write a new adapter in both formats: mm_projector.bin, and an exported model in hf/."""
    encoder = Encoder("clip", encoder)
    processor = build_processor(encoder, llm)
    torch.manual_seed(4)
    model = build_model(encoder, llm, processor)
    adapter = model.model.multi_modal_projector
    for parameter in adapter.parameters():
        parameter.data = parameter.data.bfloat16().float()
    layers = {"0": adapter.linear_1, "2": adapter.linear_2}
    weights = {
        f"model.mm_projector.{name}.{kind}": getattr(layer, kind).data
        for name, layer in layers.items()
        for kind in ("weight", "bias")
    }
    folder.mkdir()
    torch.save(weights, folder / "mm_projector.bin")
    export_hf(model, processor, folder / "hf")


def write_world(folder: Path) -> None:
    """Write all of it into an empty folder."""
    writer = Writer(folder)
    captions = [writer.caption(i) for i in range(RECORDS)]
    dialogues = [writer.dialogue(i) for i in range(RECORDS)]
    broken = break_every_40th(dialogues)
    files = {"stage1": captions, "stage2": dialogues, "stage2_broken": broken}
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    write_encoder(folder / "encoder")
    for name, rows in (("vicuna", VOCABULARY + SPARE_ROWS), ("vicuna_full", VOCABULARY)):
        write_tokenizer(folder / name, VOCABULARY, VOCABULARY)
        write_llm(folder / name, captions + dialogues, rows)
    write_adapter(folder / "adapter", str(folder / "encoder"), str(folder / "vicuna"))


if __name__ == "__main__":
    write_world(Path(sys.argv[1]))
