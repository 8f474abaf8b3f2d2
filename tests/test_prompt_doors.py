"""One prompt at all doors, for tokenizers that add a BOS, have one and do not add it, have none, or add two tokens."""

import itertools
import json
import shutil
from datetime import datetime, timedelta

import pytest
import tiny_models
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

import probes
from llava_bidir.commands.generate import answer, load_with_processor
from llava_bidir.common.tokenizer import load_tokenizer, start_ids
from llava_bidir.data.collate import Collate
from llava_bidir.data.conversation import encode
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.training.module import LlavaTraining
from probes.lab.models import open_checkpoint

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
    ("does not add its BOS", BOS_FIRST),
    ("has no BOS", None),
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
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*STARTS[kind], "$A"]),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in STARTS[kind]],
    )
    tokenizer.save(f"{folder}/tokenizer.json")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("add_bos_token", None)
    if kind == "has no BOS":
        settings["bos_token"] = None
    if chat_template is not None:
        settings["chat_template"] = chat_template
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("kind", "chat_template"), CASES, ids=lambda value: f"{value}"[:30].strip()
)
def test_prompts_have_the_same_ids_at_all_doors(kind, chat_template, parts, tmp_path, monkeypatch):
    """Of the export of a model whose LLM has such a tokenizer."""
    encoder, llm = parts[0], shutil.copytree(parts[1], tmp_path / "llm")
    write_tokenizer(llm, kind, chat_template)
    template = "vicuna_v1" if chat_template is None else "chat"
    processor = build_processor(encoder, str(llm), template=template)
    path = str(tmp_path / "hf")
    build_model(encoder, str(llm), processor).save_pretrained(path)
    processor.save_pretrained(path)
    model, processor = load_with_processor(path)
    image_id = processor.image_token_id
    turns = tiny_models.turns(f"<image>\n{QUESTION}", "wall")
    expected, _ = encode(
        turns[:1],
        tokenizer=processor.tokenizer,
        template=template,
        image_tokens=tiny_models.TOKENS,
        image_token_id=image_id,
    )

    photo = Image.new("RGB", (8, 8))
    sample = {"id": "0", "conversations": turns, "image": photo}
    collate = Collate(processor, tiny_models.TOKENS, template)
    assert collate([sample])["input_ids"][0, : len(expected)].tolist() == expected
    assert collate.prompts([sample])["input_ids"][0].tolist() == expected

    asked = []
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: asked.append(input_ids) or input_ids
    )
    answer(
        model, processor=processor, questions=[QUESTION], images=[[photo]], max_new_tokens=3
    )  # also by VQA
    assert asked[0][0].tolist() == expected

    stock = AutoProcessor.from_pretrained(path)
    content = [{"type": "image", "image": photo}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    one_step = stock.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
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
    plain, _ = encode(
        turns,
        tokenizer=processor.tokenizer,
        template="plain",
        image_tokens=tiny_models.TOKENS,
        image_token_id=image_id,
    )
    assert plain[: len(start) + 1] == [*start, image_id]

    image = expected.index(image_id)
    after = image + tiny_models.TOKENS
    for mllm in (probes.load(path), open_checkpoint(path)[0].mllm):  # the lab's
        assert mllm.prefix_ids[0].tolist() == expected[:image]
        assert mllm.ids[0].tolist() == expected[:after]
        assert mllm.chat.question_ids(QUESTION) == expected[after:]
    before = processor.tokenizer.decode(expected[:image])
    assert probes.load(path, prefix=before).prefix_ids[0].tolist() == expected[:image]


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
    ids, _ = encode(
        tiny_models.turns("sky", "wall"), tokenizer=tokenizer, template="chat", image_tokens=None
    )
    assert tokenizer.decode(ids).startswith("\n01 Jan 2025\n")
    assert "prompt_date" not in recorded[1]
