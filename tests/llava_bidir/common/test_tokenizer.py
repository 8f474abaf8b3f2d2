"""Token ids against the sentencepiece package, and which files define them."""

import shutil

import llama_tokenizers
import pytest
from hypothesis import given
from llama_tokenizers import SlowLlama, write_tokenizer
from sentencepiece import SentencePieceProcessor
from transformers import AutoProcessor, AutoTokenizer

from llava_bidir import LlavaBidirConfig
from llava_bidir.common.tokenizer import load_tokenizer
from llava_bidir.model.build import build_processor


@pytest.fixture(scope="session")
def sentencepiece(llama_folder):
    return SentencePieceProcessor(model_file=str(llama_folder / "tokenizer.model"))


@given(text=llama_tokenizers.texts())
def test_ids_of_any_text_equal_sentencepieces(text, llama_tokenizer, sentencepiece):
    expected = [1, *sentencepiece.encode(text)]
    if not any(token in text for token in SlowLlama.SPECIAL):
        assert llama_tokenizer.encode(text) == expected


@pytest.fixture(scope="session")
def export(parts, llama_folder, tmp_path_factory):
    """A processor as `fit` exports it."""
    folder = tmp_path_factory.mktemp("export")
    LlavaBidirConfig().save_pretrained(folder)
    build_processor(parts[0], str(llama_folder)).save_pretrained(folder)
    return folder


@given(text=llama_tokenizers.texts(*SlowLlama.SPECIAL))
def test_an_exports_ids_are_llavas_under_every_loader(
    text,
    export,
    slow_llama,
    loaded_exports,
):
    for tokenizer in loaded_exports:
        assert tokenizer.encode(text) == slow_llama.encode(text)


@pytest.fixture(scope="session")
def loaded_exports(export):
    loaded = AutoTokenizer.from_pretrained(export), AutoProcessor.from_pretrained(export).tokenizer
    return *loaded, load_tokenizer("export", str(export))


def test_settings_of_the_tokenizer_are_kept(llama_folder, llama_tokenizer):
    stock = AutoTokenizer.from_pretrained(llama_folder)
    for name in (
        "padding_side",
        "special_tokens_map",
        "model_max_length",
        "model_input_names",
        "all_special_ids",
    ):
        assert getattr(llama_tokenizer, name) == getattr(stock, name)
    assert llama_tokenizer.get_vocab() == stock.get_vocab()
    assert len(llama_tokenizer) == 32000
    ids = llama_tokenizer.encode("  def  f(x):\n\treturn 猫")
    assert llama_tokenizer.decode(ids) == stock.decode(ids)


@pytest.mark.parametrize("model_type", ["llama", "llava"])
@pytest.mark.parametrize("beside", ["nothing", "another vocabulary"])
def test_tokenizer_json_alone_keeps_the_ids_it_defines(
    model_type,
    beside,
    llama_folder,
    tmp_path,
):
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    if beside == "another vocabulary":
        other = write_tokenizer(tmp_path / "other", 1000)
        shutil.copy(other / "tokenizer.model", tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer("tokenizer", str(tmp_path))
    assert type(ours) is type(stock)
    assert ours.backend_tokenizer.to_str() == stock.backend_tokenizer.to_str()


def test_tokenizer_model_without_a_json_is_read_for_any_llama_based_model(
    llama_folder, slow_llama, tmp_path
):
    """transformers builds another class for the model type llava."""
    shutil.copytree(llama_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    text = "  def  f(x):\n    return  x"
    assert load_tokenizer("tokenizer", str(tmp_path)).encode(text) == slow_llama.encode(text)


@pytest.mark.parametrize(
    "settings", [{"normalization_rule_name": "nfkc"}, {"add_dummy_prefix": False}], ids=str
)
def test_other_sentencepiece_models_are_read_as_transformers_reads_them(settings, tmp_path):
    folder = write_tokenizer(tmp_path, 1000, **settings)
    stock = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer("tokenizer", str(folder))
    assert ours.backend_tokenizer.to_str() == stock.backend_tokenizer.to_str()
