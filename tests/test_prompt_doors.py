"""One prompt at all doors, for tokenizers that add a BOS, have one and do not add it, have none, or add two tokens."""

import itertools
import json
import shutil
from datetime import datetime, timedelta

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoProcessor

import probes
from llava_bidir.commands.generate import answer, load
from llava_bidir.common.tokenizer import load_tokenizer, start_ids
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import encode
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.training.module import LlavaTraining
from probes.lab.models import load_checkpoint

pytestmark = pytest.mark.numerics

QUESTION = "name the sky"
CHATML = (
    "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
BOS_FIRST = "{{ bos_token }}" + CHATML
DATED = "\n{{ strftime_now('%d %b %Y') }}\n" + CHATML
STARTS = {  # of the tokenizer
    "adds BOS": ["<s>"],
    "does not add its BOS": [],
    "has no BOS": [],
    "adds two tokens": ["<unk>", "<s>"],
}
CASES = [
    ("adds BOS", None),
    ("adds BOS", BOS_FIRST),
    ("does not add its BOS", None),
    ("does not add its BOS", CHATML),
    ("does not add its BOS", BOS_FIRST),
    ("has no BOS", None),
    ("has no BOS", CHATML),
    ("has no BOS", DATED),
    ("adds two tokens", None),
]


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Each look at the clock of chat templates shows another day of another year."""
    days = itertools.count(1)

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 1) + timedelta(days=400 * next(days))

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def write_tokenizer(folder, kind: str, chat_template: str | None) -> None:
    """Change a tokenizer into one of the kind."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokenizer["post_processor"] = None
    if start := STARTS[kind]:
        single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in start]
        single.append({"Sequence": {"id": "A", "type_id": 0}})
        special = {
            token: {
                "id": token,
                "ids": [ids[token]],
                "tokens": [token],
            }
            for token in start
        }
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": special,
        }
    file.write_text(json.dumps(tokenizer))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("add_bos_token", None)
    if kind == "has no BOS":
        settings["bos_token"] = None
    if chat_template is not None:
        settings["chat_template"] = chat_template
    file.write_text(json.dumps(settings))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1]}"[:40])
def checkpoint(request, parts, tmp_path_factory):
    """The export of a model whose LLM has such a tokenizer, and the template of its training."""
    kind, chat_template = request.param
    encoder, llm = parts
    root = tmp_path_factory.mktemp("prompts")
    shutil.copytree(llm, root / "llm")
    write_tokenizer(root / "llm", kind, chat_template)
    template = "vicuna_v1" if chat_template is None else "chat"
    processor = build_processor(encoder, str(root / "llm"), template=template)
    torch.manual_seed(3)
    model = build_model(encoder, str(root / "llm"), processor)
    tiny_models.sharpen(model, 8.0)
    model.save_pretrained(root / "hf")
    processor.save_pretrained(root / "hf")
    return str(root / "hf"), template


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))


def training_ids(processor, template: str) -> list[int]:
    """The prompt of the question in a record of the training data."""
    turns = tiny_models.turns(f"<image>\n{QUESTION}")
    image = tiny_models.TOKENS, processor.image_token_id
    return encode(turns, processor.tokenizer, template, *image)[0]


def test_prompts_have_the_same_ids_at_all_doors(checkpoint, photo, monkeypatch):
    path, template = checkpoint
    model, processor = load(path)
    expected = training_ids(processor, template)

    turns = tiny_models.turns(f"<image>\n{QUESTION}", "wall")
    sample = {"id": "0", "conversations": turns, "image": photo}
    collate = Collate(processor, tiny_models.TOKENS, template)
    assert collate([sample])["input_ids"][0, : len(expected)].tolist() == expected
    assert collate.prompts([sample])["input_ids"][0].tolist() == expected

    asked = []
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: asked.append(input_ids) or input_ids
    )
    answer(model, processor, [QUESTION], [[photo]], 3)  # also by VQA
    assert asked[0][0].tolist() == expected

    stock = AutoProcessor.from_pretrained(path)
    content = [{"type": "image", "image": photo}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    one_step = stock.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert one_step["input_ids"][0] == expected
    text = stock.apply_chat_template(messages, add_generation_prompt=True)
    # whoever tokenises text that a chat template begins with BOS says so, as transformers does in one step
    begun = text.startswith("<s>")
    two_steps = stock(text=text, images=[photo], add_special_tokens=not begun)
    assert two_steps["input_ids"][0] == expected

    start = start_ids(processor.tokenizer)
    for text in ("name the sky", " sky", ""):
        alone = processor.tokenizer.encode(text, add_special_tokens=False)
        assert start_ids(processor.tokenizer, text) + alone == processor.tokenizer.encode(text)
    turns = tiny_models.turns("<image>", "wall")
    image_id = processor.image_token_id
    plain, _ = encode(turns, processor.tokenizer, "plain", tiny_models.TOKENS, image_id)
    assert plain[: len(start) + 1] == [*start, image_id]

    image = expected.index(processor.image_token_id)
    after = image + tiny_models.TOKENS
    for mllm in (probes.load(path), load_checkpoint(path)[0].mllm):  # the lab's
        assert mllm.prefix_ids[0].tolist() == expected[:image]
        assert mllm.ids[0].tolist() == expected[:after]
        assert mllm.chat.question_ids(QUESTION) == expected[after:]
    before = processor.tokenizer.decode(expected[:image])
    assert probes.load(path, prefix=before).prefix_ids[0].tolist() == expected[:image]


def test_states_are_those_of_the_prompt_of_training(checkpoint, photo):
    path, template = checkpoint
    model, processor = load(path)
    ids = torch.tensor([training_ids(processor, template)])
    mllm = probes.load(path, device="cpu")
    pixels = mllm.preprocess(photo)
    output = model(
        input_ids=ids,
        pixel_values=pixels,
        output_hidden_states=True,
    )
    expected = output.hidden_states[-1][:, ids[0] == processor.image_token_id]
    torch.testing.assert_close(mllm.states(pixels)["final_norm"], expected)


def test_training_records_the_date_of_its_prompts(parts, tmp_path):
    encoder, llm = parts
    dated = shutil.copytree(llm, tmp_path / "llm")
    write_tokenizer(dated, "has no BOS", DATED)
    write_tokenizer(shutil.copytree(llm, tmp_path / "other"), "has no BOS", CHATML)
    recorded = [
        LlavaTraining(encoder, str(tmp_path / name), ["adapter"], template="chat").settings()
        for name in ("llm", "other")
    ]
    assert recorded[0]["prompt_date"] == "2025-01-01"
    tokenizer = load_tokenizer("llm", str(dated))
    ids, _ = encode(tiny_models.turns("sky", "wall"), tokenizer, "chat", None)
    assert tokenizer.decode(ids).startswith("\n01 Jan 2025\n")
    assert "prompt_date" not in recorded[1]
