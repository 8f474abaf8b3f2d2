"""SmolLM2-135M-Instruct, converted once, and models that were trained on it for a few steps."""

import json
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from experiments.real.import_gguf import import_gguf
from experiments.real.run import find_model
from llava_bidir.cli import main
from llava_bidir.common.errors import UserError

STEPS = 3  # of each training


@pytest.fixture(scope="session")
def gguf_file() -> Iterator[Path]:
    """The file, which is parsed once: transformers does so for each config, tokenizer and model."""
    try:
        file = find_model()
    except UserError as error:
        pytest.skip(str(error))
    if find_spec("gguf") is None:
        pytest.skip("needs the package gguf: pip install gguf")
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        for slow in (gguf.GGUFReader, gguf.get_tensor_name_map):
            patch.setattr(gguf, slow.__name__, cache(slow))
        yield file


@pytest.fixture(scope="session")
def llm(gguf_file, tmp_path_factory) -> Path:
    """The model as a directory."""
    out = tmp_path_factory.mktemp("llm") / "smollm2"
    import_gguf(gguf_file, out)
    return out


@pytest.fixture(scope="session")
def tokenizer(llm):
    return AutoTokenizer.from_pretrained(llm)


@pytest.fixture(scope="session")
def language_model(llm):
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A tiny CLIP: four image tokens."""
    encoder, _ = tiny_models.write_parts(tmp_path_factory.mktemp("parts"))
    return encoder


@pytest.fixture(scope="session")
def english(tmp_path_factory) -> Path:
    """Twelve dialogues in English with their images; two of them have none."""
    root = tmp_path_factory.mktemp("english")
    rng = np.random.default_rng(0)
    records = {"dialogues": [], "captions": []}
    for i in range(12):
        pixels = rng.integers(0, 255, (10, 14, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        picture = {"image": f"{i}.png"}
        caption = f"A street with {i + 2} trees,\nthe sky and a car."
        turns = [
            "<image>\n" * (i < 10) + "Is this a room or a street?",
            ("a room", "a street")[i % 2],
            "Describe the picture.",
            caption,
        ]
        record = {"id": f"r{i}", "conversations": tiny_models.turns(*turns)}
        records["dialogues"].append(record | (picture if i < 10 else {}))
        turns = tiny_models.turns("<image>\nDescribe the picture.", caption)
        records["captions"].append({"id": f"c{i}", "conversations": turns} | picture)
    for name, written in records.items():
        (root / f"{name}.json").write_text(json.dumps(written))
    return root


@pytest.fixture(scope="session")
def two_layers(llm, tokenizer, tmp_path_factory) -> Path:
    """The first two of its 30 layers, for what does not depend on language."""
    out = tmp_path_factory.mktemp("llm") / "two_layers"
    config = AutoConfig.from_pretrained(llm, num_hidden_layers=2)
    two = AutoModelForCausalLM.from_pretrained(llm, config=config, dtype=torch.float32)
    two.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def options(encoder, english):
    """A function that returns the options of `llava-bidir fit` for a stage of three steps."""

    def build(stage: str, llm: Path, out: Path) -> list[str]:
        records = "captions" if stage == "stage1" else "dialogues"
        words = f"fit -c configs/real/{stage}.yaml --out {out} --model.llm {llm}"
        words += f" --model.encoder.path {encoder.path} --model.encoder.name clip"
        words += " --model.encoder.image_px null --model.image_attention bidirectional"
        words += f" --data.images {english} --data.annotations {english}/{records}.json"
        words += f" --data.batch_size 4 --data.micro_batch_size 2 --trainer.max_steps {STEPS}"
        if stage == "stage1":  # of the tiny encoder, whose features have norm 1
            words += " --model.adapter_init_scale 4"
        if stage == "stage2":  # LLaVA's rate for the LLM
            words += " --data.val_annotations null --model.learning_rate 2e-5"
        return words.split()

    return build


def trained(options, llm: Path, runs: Path) -> tuple[Path, Path]:
    """Train both stages on an LLM and return their exports."""
    main(options("stage1", llm, runs / "stage1"))
    stage1 = runs / "stage1/hf"
    main([*options("stage2", llm, runs / "stage2"), "--model.adapter", str(stage1)])
    return stage1, runs / "stage2/hf"


@pytest.fixture(scope="session")
def stages(options, llm, tmp_path_factory) -> tuple[Path, Path]:
    """Both stages of the complete model."""
    return trained(options, llm, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def small_stages(options, two_layers, tmp_path_factory) -> tuple[Path, Path]:
    """Both stages of the model of two layers."""
    return trained(options, two_layers, tmp_path_factory.mktemp("small"))
