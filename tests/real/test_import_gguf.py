"""GGUF files as Hugging Face directories: equal tensors, tokens and templates; files that cannot be read are errors."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from experiments.real import import_gguf
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights
from llava_bidir.common.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
HEADS = 4
KEY_HEADS = 2
CONTROL = 3
NORMAL = 1
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def byte_level_bpe() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=alphabet,
        special_tokens=SPECIAL,
    )
    raw.train_from_iterator(
        ["the cat sat on the mat, then the cat went\n away \n\n  with it"] * 4,
        trainer,
    )
    return raw


def llama(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        vocab_size=vocabulary,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        rope_theta=500.0,
        tie_word_embeddings=tied,
    )
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return built


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows as GGUF has them: of each head, row i of the first half, then row i of the second, in a loop."""
    half = len(rows) // heads // 2
    order = [
        head * 2 * half + part * half + i
        for head in range(heads)
        for i in range(half)
        for part in range(2)
    ]
    return rows[order]


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if ".layers." in name:
            _, _, layer, *middle, kind = name.split(".")
            short = NAMES[".".join(middle)]
            heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(short)
            tensors[f"blk.{layer}.{short}.{kind}"] = permuted(value, heads) if heads else value
        else:
            ends = {
                "model.embed_tokens.weight": "token_embd",
                "model.norm.weight": "output_norm",
            }
            tensors[f"{ends.get(name, 'output')}.weight"] = value
    return tensors


def write(
    path,
    quantised: bool = False,
    tied: bool = True,
    extra: dict | None = None,
    metadata: dict | None = None,
    pre: str | None = "gpt-2",
):
    """Write a tiny model with the writer of the package gguf, and return model and tokenizer."""
    raw = byte_level_bpe()
    model = llama(raw.get_vocab_size(), tied)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(500.0)
    for key, value in (metadata or {}).items():
        writer.add_float32(f"llama.{key}", value)
    tokens = sorted(raw.get_vocab(), key=raw.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(3)
    writer.add_chat_template(TEMPLATE)
    for name, value in (gguf_tensors(model) | (extra or {})).items():
        if quantised and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, raw


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_tensors_and_logits_are_those_of_the_file(quantised, tied, tmp_path):
    model, _ = write(tmp_path / "tiny.gguf", quantised, tied)
    import_gguf.import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
    }
    imported = load_weights("llm", AutoModelForCausalLM, str(tmp_path / "hf"))
    written = gguf_tensors(imported)
    assert written.keys() == stored.keys()
    for name, value in stored.items():
        assert np.array_equal(written[name], value), name
    assert imported.dtype == torch.float32
    assert not hasattr(imported.config, "quantization_config")
    if not quantised:
        ids = torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(imported(ids).logits, model(ids).logits)


def test_tokens_template_and_special_tokens_are_carried_over(tmp_path):
    _, raw = write(tmp_path / "tiny.gguf")
    import_gguf.import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
    (tmp_path / "tiny.gguf").unlink()  # nothing refers to it any more
    tokenizer = load_tokenizer("llm", str(tmp_path / "hf"))
    for text in (
        "the cat",
        " the  cat\n\n sat",
        "\n",
        "<|im_start|>user\nthe mat<|im_end|>\n",
        "unheard \u20ac words",
    ):
        assert tokenizer.encode(text, add_special_tokens=False) == raw.encode(text).ids, text
        assert tokenizer.decode(raw.encode(text).ids) == text
    assert (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ) == (1, 2, 3)
    assert tokenizer.chat_template == TEMPLATE
    turns = [{"role": "user", "content": "the cat"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (
        model.generation_config.eos_token_id,
        model.config.max_position_embeddings,
    ) == (2, 64)
    assert tokenizer.decode([2], skip_special_tokens=True) == ""


@pytest.mark.parametrize("pre", ["default", None])
def test_a_split_of_texts_that_is_not_known_is_refused_by_name(pre, tmp_path):
    write(tmp_path / "tiny.gguf", pre=pre)
    with pytest.raises(UserError, match=f"tiny.gguf has tokenizer.ggml.pre {pre!r}, so that texts"):
        import_gguf.import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_digits_are_apart_where_the_file_says_smollm(tmp_path):
    """SmolLM2's own tokenizer.json has these two, in this order."""
    _, raw = write(tmp_path / "tiny.gguf", pre="smollm")
    own = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(False),
    ]
    import_gguf.import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
    backend = load_tokenizer("llm", str(tmp_path / "hf")).backend_tokenizer.pre_tokenizer
    for text in ("x =  10", "  3", "a12 cats"):
        parts = pre_tokenizers.Sequence(own).pre_tokenize_str(text)
        assert backend.pre_tokenize_str(text) == parts != raw.pre_tokenizer.pre_tokenize_str(text)


def test_tensors_that_transformers_leaves_out_are_warned_of(tmp_path):
    write(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.warns(UserWarning, match="reads 27,808 of 27,812 weights. It leaves out tensors"):
        import_gguf.import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")


@pytest.mark.parametrize("key", ["final_logit_softcapping", "attention.scale"])
def test_metadata_that_would_be_lost_is_an_error_that_names_it(key, tmp_path):
    write(tmp_path / "tiny.gguf", metadata={key: 0.5})
    with pytest.raises(UserError, match=f"tiny.gguf has {key} = 0.5 in its metadata"):
        import_gguf.import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
