"""A checkpoint's weights are those that transformers reads, at every door; other files beside them change nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import read_tensors, weight_files
from llava_bidir.common.identity import model_identity
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration

LAYER = "multi_modal_projector.linear_1.weight"


@pytest.fixture
def folder(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["causal"], tmp_path / "hf")


def older(folder):
    """Return the tensors of a folder with another adapter."""
    tensors = load_file(folder / "model.safetensors")
    return {name: x + ("projector" in name) for name, x in tensors.items()}


def write_shards(folder, tensors, stem: str = "model", suffix: str = "safetensors") -> None:
    """Write tensors in two files with an index, as transformers does."""
    names = sorted(tensors)
    halves = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, half in halves.items():
        part = {name: tensors[name] for name in half}
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})
    index = {name: file for file, half in halves.items() for name in half}
    content = json.dumps({"metadata": {}, "weight_map": index})
    (folder / f"{stem}.{suffix}.index.json").write_text(content)


def save_older(folder, name: str) -> None:
    save_file(older(folder), folder / name, {"format": "pt"})


def shards_with_a_stray_one(folder) -> None:
    write_shards(folder, load_file(folder / "model.safetensors"))
    save_older(folder, "zzz.safetensors")
    (folder / "model.safetensors").unlink()


def pickles(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    torch.save(older(folder), folder / "pytorch_model_old.bin")
    (folder / "model.safetensors").unlink()


def pickled_shards(folder) -> None:
    write_shards(folder, load_file(folder / "model.safetensors"), "pytorch_model", "bin")
    torch.save(older(folder), folder / "pytorch_model-00003-of-00003.bin")
    (folder / "model.safetensors").unlink()


def named_in_the_config(folder) -> None:
    save_older(folder, "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "other.safetensors"})
    )


LAYOUTS = {
    "an earlier file": lambda folder: save_older(folder, "model_old.safetensors"),
    "a later name": lambda folder: save_older(folder, "z.safetensors"),
    "an index of earlier shards": lambda folder: write_shards(folder, older(folder)),
    "earlier pickles": lambda folder: torch.save(older(folder), folder / "pytorch_model.bin"),
    "shards and a stray file": shards_with_a_stray_one,
    "pickles": pickles,
    "pickled shards": pickled_shards,
    "a name in the config": named_in_the_config,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adapter_is_the_one_that_transformers_reads(layout, folder, parts):
    LAYOUTS[layout](folder)
    read = LlavaBidirForConditionalGeneration.from_pretrained(folder)
    expected = read.state_dict()[f"model.{LAYER}"]
    built = build_model(*parts, build_processor(*parts), adapter=str(folder))
    assert torch.equal(built.state_dict()[f"model.{LAYER}"], expected)
    assert torch.equal(read_tensors(folder, LAYER)[f"model.{LAYER}"], expected)


@pytest.mark.parametrize("layout", list(LAYOUTS)[:4])
def test_files_beside_the_weights_do_not_change_the_identity(layout, folder):
    before = model_identity("model.mllm", folder)
    LAYOUTS[layout](folder)
    assert model_identity("model.mllm", folder) == before


def test_an_identity_has_all_shards_and_their_index(folder):
    shards_with_a_stray_one(folder)
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    identity = model_identity("model.mllm", folder)
    assert {name for name in identity if "safetensors" in name} == {
        *shards,
        "model.safetensors.index.json",
    }


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "absent.safetensors"}}', "names absent.safetensors, which does not"),
        ('{"weight_map": {"a": 3}}', "model.safetensors.index.json: expected weight_map"),
    ],
)
def test_an_index_without_its_files_is_an_error(index, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        weight_files(tmp_path)
