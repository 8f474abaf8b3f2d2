"""A checkpoint's weights are those that transformers reads, at every door; other files beside them change nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import probes
from llava_bidir.commands import generate
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import read_tensors
from llava_bidir.common.identity import model_identity
from llava_bidir.model.build import build_model, build_processor, load_llm
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration

LAYER = "multi_modal_projector.linear_1.weight"


@pytest.fixture
def folder(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["causal"], tmp_path / "hf")


def older(folder):
    """Return the tensors of a folder with another adapter."""
    tensors = load_file(folder / "model.safetensors")
    return {name: x + ("projector" in name) for name, x in tensors.items()}


def write_shards(folder, tensors) -> None:
    """Write tensors in two files with an index, as transformers does."""
    names = sorted(tensors)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file, {"format": "pt"})
    index = {name: file for file, half in halves.items() for name in half}
    content = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(content)


def save_older(folder, name: str) -> None:
    save_file(older(folder), folder / name, {"format": "pt"})


def shards_with_a_stray_one(folder) -> None:
    write_shards(folder, load_file(folder / "model.safetensors"))
    save_older(folder, "zzz.safetensors")
    (folder / "model.safetensors").unlink()


LAYOUTS = {
    "an earlier file": lambda folder: save_older(folder, "model_old.safetensors"),
    "a later name": lambda folder: save_older(folder, "z.safetensors"),
    "an index of earlier shards": lambda folder: write_shards(folder, older(folder)),
    "earlier pickles": lambda folder: torch.save(older(folder), folder / "pytorch_model.bin"),
    "shards and a stray file": shards_with_a_stray_one,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adapter_is_the_one_that_transformers_reads(layout, folder, parts):
    LAYOUTS[layout](folder)
    read = LlavaBidirForConditionalGeneration.from_pretrained(folder)
    expected = read.state_dict()[f"model.{LAYER}"]
    built = build_model(*parts, build_processor(*parts), adapter=str(folder))
    assert torch.equal(built.state_dict()[f"model.{LAYER}"], expected)
    assert torch.equal(read_tensors(folder, LAYER)[f"model.{LAYER}"], expected)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder, parts: probes.load(folder),
        lambda folder, parts: generate.load_with_processor(str(folder)),
        lambda folder, parts: load_llm(str(folder), 8),
        lambda folder, parts: build_model(*parts, build_processor(*parts), adapter=str(folder)),
    ],
)
def test_a_stale_copy_of_a_tensor_in_another_shard_is_refused(read, folder, parts):
    """transformers would read it, as the last one."""
    tensors = load_file(folder / "model.safetensors")
    write_shards(folder, tensors)
    (folder / "model.safetensors").unlink()
    second = folder / "model-00002-of-00002.safetensors"
    name = f"model.{LAYER}".replace("weight", "bias")
    save_file(load_file(second) | {name: tensors[name] + 1}, second, {"format": "pt"})
    with pytest.raises(UserError, match=f"00002-of-00002.* has {name}, .* names in .*00001-of"):
        read(folder, parts)


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
