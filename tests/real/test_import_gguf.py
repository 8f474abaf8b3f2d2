"""GGUF files as Hugging Face directories: equal tensors, tokens and templates; files that cannot be read are errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from experiments.real import import_gguf
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights
from llava_bidir.common.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
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
ENDS = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}


def byte_level_bpe() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL
    )
    text = "the cat sat on the mat, then the cat went\n away \n\n  with it"
    raw.train_from_iterator([text] * 4, trainer)
    return raw


def llama(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = tiny_models.llama_config(vocabulary, rope_theta=500.0, tie_word_embeddings=tied)
    config.intermediate_size = 64  # Q8_0 has blocks of 32
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
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if ".layers." in name:
            _, _, layer, *middle, kind = name.split(".")
            short = NAMES[".".join(middle)]
            value = permuted(value, heads[short]) if short in heads else value
            tensors[f"blk.{layer}.{short}.{kind}"] = value
        else:
            tensors[f"{ENDS.get(name, 'output')}.weight"] = value
    return tensors


@pytest.fixture
def write(tmp_path):
    """A function that writes a tiny model with the writer of the package gguf, and returns model and tokenizer."""

    def run(
        quantised: bool = False,
        tied: bool = True,
        extra: dict | None = None,
        metadata: dict | None = None,
        pre: str | None = "gpt-2",
    ):
        raw = byte_level_bpe()
        model = llama(raw.get_vocab_size(), tied)
        config = model.config
        writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(500.0)
        for key, value in (metadata or {}).items():
            writer.add_float32(f"llama.{key}", value)
        tokens = sorted(raw.get_vocab(), key=raw.get_vocab().get)
        kinds = gguf.TokenType
        merges = json.loads(raw.to_str())["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([kinds.CONTROL if x in SPECIAL else kinds.NORMAL for x in tokens])
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(3)
        writer.add_chat_template(TEMPLATE)
        kind = gguf.GGMLQuantizationType.Q8_0
        for name, value in (gguf_tensors(model) | (extra or {})).items():
            if quantised and value.ndim == 2:
                writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return model, raw

    return run


@pytest.fixture
def read(tmp_path):
    """A function that imports the file and returns the folder of the model."""

    def run() -> Path:
        import_gguf.import_gguf(tmp_path / "tiny.gguf", tmp_path / "hf")
        return tmp_path / "hf"

    return run


@pytest.mark.parametrize(("quantised", "tied"), [(True, True), (False, False)])
def test_tensors_and_logits_are_those_of_the_file(quantised, tied, write, read, tmp_path):
    model, _ = write(quantised, tied)
    imported = load_weights("llm", AutoModelForCausalLM, str(read()))
    written = gguf_tensors(imported)
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
    }
    assert written.keys() == stored.keys()
    for name, value in stored.items():
        assert np.array_equal(written[name], value), name
    assert imported.dtype == torch.float32
    assert not hasattr(imported.config, "quantization_config")
    if not quantised:
        ids = torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(imported(ids).logits, model(ids).logits)


TEXTS = (
    "the cat",
    " the  cat\n\n sat",
    "\n",
    "<|im_start|>user\nthe mat<|im_end|>\n",
    "unheard \u20ac words",
)


def test_tokens_template_and_special_tokens_are_carried_over(write, read, tmp_path):
    _, raw = write()
    folder = read()
    (tmp_path / "tiny.gguf").unlink()  # nothing refers to it any more
    tokenizer = load_tokenizer("llm", str(folder))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == raw.encode(text).ids, text
        assert tokenizer.decode(raw.encode(text).ids) == text
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert special == (1, 2, 3)
    assert tokenizer.chat_template == TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 2
    assert model.config.max_position_embeddings == 64
    assert tokenizer.decode([2], skip_special_tokens=True) == ""


def test_digits_are_apart_where_the_file_says_smollm(write, read):
    """SmolLM2's own tokenizer.json has these two, in this order."""
    _, raw = write(pre="smollm")
    own = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    backend = load_tokenizer("llm", str(read())).backend_tokenizer.pre_tokenizer
    for text in ("x =  10", "  3", "a12 cats"):
        parts = pre_tokenizers.Sequence(own).pre_tokenize_str(text)
        assert backend.pre_tokenize_str(text) == parts != raw.pre_tokenizer.pre_tokenize_str(text)


def test_tensors_that_transformers_leaves_out_are_warned_of(write, read):
    write(extra={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.warns(UserWarning, match="of .* weights. It leaves out tensors"):
        read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": {"attention.scale": 0.5}}, "attention.scale = 0.5 in its metadata"),
        ({"pre": "default"}, "tokenizer.ggml.pre 'default', so that texts"),
        ({"pre": None}, "tokenizer.ggml.pre None, so that texts"),
    ],
)
def test_what_would_be_lost_is_an_error_that_names_it(options, message, write, read, tmp_path):
    write(**options)
    with pytest.raises(UserError, match=f"tiny.gguf has {message}"):
        read()
    assert not (tmp_path / "hf").exists()
