"""Token ids against the sentencepiece package, and which files define them."""

import shutil

import llama_tokenizers
import pytest
from hypothesis import given
from llama_tokenizers import SlowLlama, write_tokenizer
from transformers import AutoProcessor, AutoTokenizer

from llava_bidir import LlavaBidirConfig
from llava_bidir.common.tokenizer import load_tokenizer
from llava_bidir.model.build import build_processor


@pytest.fixture(scope="session")
def export(parts, llama_folder, tmp_path_factory):
    """A processor as `fit` exports it."""
    folder = tmp_path_factory.mktemp("export")
    LlavaBidirConfig().save_pretrained(folder)
    build_processor(parts[0], str(llama_folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizers(export, llama_tokenizer):
    """As training loads it, and an export's under every loader."""
    loaded = AutoTokenizer.from_pretrained(export), AutoProcessor.from_pretrained(export).tokenizer
    return llama_tokenizer, *loaded, load_tokenizer("export", str(export))


@given(text=llama_tokenizers.texts(*SlowLlama.SPECIAL))
def test_ids_of_any_text_are_sentencepieces_in_training_and_in_exports(
    text, slow_llama, tokenizers
):
    for tokenizer in tokenizers:
        assert tokenizer.encode(text) == slow_llama.encode(text)


@pytest.mark.parametrize("model_type", ["llama", "llava"])
def test_a_tokenizer_json_keeps_the_ids_it_defines_beside_another_vocabulary(
    model_type, llama_folder, tmp_path
):
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
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
