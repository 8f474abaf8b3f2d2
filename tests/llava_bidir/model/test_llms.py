"""Any causal LM of transformers keeps its logits as a part of our model, or is refused when the model is built."""

import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.common.errors import UserError
from llava_bidir.data.collate import Collate
from llava_bidir.model.build import build_model, build_processor, resize_vocabulary
from llava_bidir.model.export import as_llava, export_hf
from llava_bidir.training.module import LlavaTraining

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
HEADS = {**SIZES, "num_key_value_heads": 4}
LLMS = {  # model type: its settings
    "llama": SIZES,
    "granite": SIZES | {"logits_scaling": 8.0},
    "granitemoe": SIZES | {"logits_scaling": 8.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": SIZES | {"logit_scale": 0.25},
    "cohere2": SIZES | {"logit_scale": 0.25, "sliding_window": 8},
    "gemma": SIZES,
    "gemma2": SIZES | {"final_logit_softcapping": 1.0, "sliding_window": 8},
    "gemma3_text": SIZES | {"final_logit_softcapping": 1.0, "sliding_window": 8},
    "nanochat": HEADS | {"final_logit_softcapping": 1.0},
    "gpt_neox": HEADS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "phi": SIZES,
    "phi3": SIZES,
    "qwen2": SIZES | {"tie_word_embeddings": True},
    "qwen3": SIZES,
    "mistral": SIZES | {"sliding_window": 8},
    "olmo2": SIZES,
    "stablelm": SIZES,
    "starcoder2": SIZES,
    "smollm3": SIZES,
    "glm4": SIZES,
}
REFUSED = {  # model type: (its settings, why)
    "hyperclovax": (SIZES | {"logits_scaling": 8.0}, "hyperclovax computes them in a way"),
    "recurrent_gemma": (  # in transformers 5.23 its forward as a part of a model fails
        SIZES | {"num_hidden_layers": 3},
        "(recurrent_gemma computes them in a way|no attribute 'past_key_values')",
    ),
    "bert": (SIZES | {"is_decoder": True}, "bert computes them in a way"),
    "bart": ({"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4}, "not auto"),
}
EAGER = {"gemma2", "recurrent_gemma"}  # transformers runs them with no other attention
NEW = 6


def write_llm(folder: Path, tokenizer: str, kind: str, settings: dict) -> str:
    """Write an LLM with random biases and norms, which are 0 and 1 in new models."""
    words = len(AutoTokenizer.from_pretrained(tokenizer))
    config = AutoConfig.for_model(
        kind, **settings, vocab_size=words, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    llm.save_pretrained(folder)
    for file in Path(tokenizer).glob("token*"):
        shutil.copy(file, folder)
    return str(folder)


def backend(kind: str) -> str:
    return "eager" if kind in EAGER else "sdpa"


@pytest.fixture(scope="module")
def llm_of(parts, tmp_path_factory):
    """A function that returns the folder of an LLM of a kind."""

    def write(kind: str) -> str:
        folder = tmp_path_factory.mktemp(kind)
        return write_llm(folder / "llm", tokenizer=parts[1], kind=kind, settings=LLMS[kind])

    return write


def build(parts, llm: str, kind: str):
    processor = build_processor(parts[0], llm)
    return build_model(parts[0], llm, processor, attn_implementation=backend(kind)).eval()


@pytest.mark.parametrize("kind", LLMS)
def test_logits_answers_and_loss_are_the_llms_own_and_those_of_the_export(
    kind, parts, llm_of, tmp_path
):
    llm = llm_of(kind)
    module = LlavaTraining(
        parts[0], llm, trainable=["adapter", "llm"], attn_implementation=backend(kind)
    )
    module.configure_model()
    stock_llm = AutoModelForCausalLM.from_pretrained(llm, attn_implementation=backend(kind)).eval()
    resize_vocabulary(stock_llm, len(module.processor.tokenizer))
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    said = stock_llm.generate(ids, **settings)
    export_hf(module.model, module.processor, tmp_path / "hf")
    exported = LlavaBidirForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation=backend(kind)
    )
    for model in (module.model.eval(), exported.eval()):
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, stock_llm(input_ids=ids).logits, rtol=0, atol=1e-5)
        assert torch.equal(model.generate(input_ids=ids, **settings), said)

    answers = ("wall road", "sky", "road of the wall")
    samples = [
        {"id": "x", "image": None, "conversations": tiny_models.turns("name the sky", answer)}
        for answer in answers
    ]
    batch = Collate(module.processor, tiny_models.TOKENS, "vicuna_v1")(samples)
    expected = F.cross_entropy(
        stock_llm(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=-100,
    )
    torch.testing.assert_close(module.loss(batch), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_llms_are_refused_when_the_model_is_built(kind, parts, tmp_path):
    settings, message = REFUSED[kind]
    llm = write_llm(tmp_path / "llm", tokenizer=parts[1], kind=kind, settings=settings)
    with pytest.raises(UserError, match=f"model.llm.*{message}"):
        build(parts, llm, kind)


def test_an_unknown_step_after_the_head_is_refused_with_its_size(parts, llm_of, monkeypatch):
    monkeypatch.setattr("llava_bidir.model.modeling_llava_bidir.logit_steps", lambda config: {})
    message = r"logits of a text differ by \S+ from .*, whose largest is \S+: granite computes"
    with pytest.raises(UserError, match=message):
        build(parts, llm_of("granite"), "granite")


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("granite", "logits_scaling"),
        ("cohere", "logit_scale"),
        ("gemma3_text", "final_logit_softcapping"),
        ("phi", "a bias"),
    ],
)
def test_stock_llava_is_refused_where_it_would_leave_a_step_out(kind, step, parts, llm_of):
    built = build(parts, llm_of(kind), kind)
    with pytest.raises(UserError, match=f"--as-llava: {kind} makes its logits with {step}"):
        as_llava(built)
