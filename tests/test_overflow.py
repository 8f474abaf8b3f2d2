"""States and logits that overflow float16 are refused at every door that reads them from a model."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_encoders
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import llava_bidir.cli
import probes
from llava_bidir.commands.generate import answer, load_with_processor
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs
from llava_bidir.training.module import LlavaTraining
from probes import Knockout
from probes.models.random_weights import match_updates, scale_layers

LLAMA_LAYER_2 = "model.language_model.layers.1.mlp.down_proj.weight"
DINO_LAYER_2 = "encoder.layer.1.mlp.fc2.weight"
LAYER_2 = r"states at layer_02 are NaN or infinite.*bfloat16 or float32"
FINAL_NORM = r"states at final_norm are NaN or infinite.*bfloat16 or float32"
LOGITS = r"logits at the output head are NaN or infinite.*bfloat16 or float32"
BLOCKED = torch.tensor([[True, False, False, False]])


def in_float16(source: str | Path, folder: Path, large: str = "") -> str:
    """Copy a checkpoint as float16, with the weights of one tensor so large that what they add exceeds 65,504."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name == large:
            tensor = tensor * 6e4 / tensor.abs().max()
        tensors[name] = tensor.half()
        assert tensors[name].isfinite().all()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | {"dtype": "float16"}
    for part in ("text_config", "vision_config"):
        if part in settings:
            settings[part]["dtype"] = "float16"
    path.write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def planted(checkpoints, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("planted") / "hf"
    return in_float16(checkpoints["bidirectional"], folder, LLAMA_LAYER_2)


@pytest.fixture(scope="module")
def mllm(planted):
    return probes.load(planted, device="cpu")


@pytest.fixture
def photo(segmentation) -> Path:
    return segmentation / "images/validation/000.png"


CUT = Knockout(BLOCKED, [3])
STATES = {
    "all sites": {},
    "a later layer": {"sites": ["layer_02"]},
    "rows of a knockout": {"knockout": Knockout(BLOCKED[[0, 0]], [3]), "rows": [0, 0]},
    "hooks": {"hooks": {"layer_01": torch.neg}},
}
QUESTION = "name the sky"


@pytest.mark.parametrize("door", STATES)
def test_states_of_image_tokens_that_overflow_are_refused_with_their_site(door, mllm, photo):
    with pytest.raises(UserError, match=LAYER_2):
        mllm.states(mllm.preprocess(photo), **STATES[door])


def test_attention_and_mask_of_layers_that_overflow_are_refused(mllm, photo):
    with pytest.raises(UserError, match=LAYER_2):
        mllm.attention(mllm.preprocess(photo), ["layer_02"])
    with pytest.raises(UserError, match=LAYER_2):
        mllm.measured_mask()


def test_states_of_text_that_overflow_are_refused(mllm, photo):
    pixels = mllm.preprocess(photo)
    for ask in (
        lambda: mllm.answer(photo, QUESTION),
        lambda: mllm.answer(photo, QUESTION, CUT),
        lambda: mllm.answer_log_probs(pixels, QUESTION, ["sky", "wall"]),
        lambda: mllm.answer_attention(pixels, question=QUESTION, answer="wall", sites=["layer_03"]),
    ):
        with pytest.raises(UserError, match=FINAL_NORM):
            ask()


def test_sites_before_the_overflow_can_be_read(mllm, photo, planted):
    sites = ["encoder", "adapter", "layer_01"]
    assert list(mllm.states(mllm.preprocess(photo), sites)) == sites
    full = probes.load(planted, device="cpu", dtype="float32")
    assert full.states(full.preprocess(photo))["layer_02"].abs().max() > 65_504
    full.answer(photo, QUESTION, max_new_tokens=3)


def test_logits_that_overflow_are_refused(checkpoints, photo):
    mllm = probes.load(str(checkpoints["causal"]), device="cpu")
    pixels = mllm.preprocess(photo)
    states = mllm.states(pixels)["final_norm"] * 1e3
    with torch.no_grad():
        mllm.model.lm_head.weight.mul_(1e38)
    with pytest.raises(UserError, match="logits at final_norm are NaN or infinite"):
        mllm.logit_lens({"final_norm": states})


def test_states_of_a_bare_encoder_that_overflow_are_refused(photo, tmp_path):
    stock = tiny_encoders.STOCK["dinov2"].write(tmp_path / "float32")
    path = in_float16(stock, tmp_path / "float16", DINO_LAYER_2)
    encoder = probes.load(path, device="cpu")
    pixels = encoder.preprocess(photo)
    for knockout in (None, Knockout(torch.arange(36)[None] == 3)):
        with pytest.raises(UserError, match=LAYER_2):
            encoder.states(pixels, knockout=knockout)
    assert encoder.states(pixels, ["layer_01"])


def test_random_layers_that_overflow_while_they_are_matched_are_refused(
    checkpoints, photo, tmp_path
):
    """The trained ones do not. That updates "cannot be matched" would be wrong advice."""
    path = in_float16(checkpoints["causal"], tmp_path / "hf")
    mllm = probes.load(path, device="cpu")
    pixels = mllm.preprocess(photo)
    mllm.states(pixels)
    scales = [1.0, 1.0, 1.0]
    with scale_layers(mllm, scales):
        with pytest.raises(UserError, match=r"states at layer_02 are NaN or infinite"):
            match_updates(mllm, pixels=pixels, updates=[0.1, 1e6, 0.1], scales=scales)


def test_generated_answers_are_refused(planted, photo):
    """Of the command, and of `answer`, by which VQA asks."""
    with pytest.raises(SystemExit, match=LOGITS):
        llava_bidir.cli.main(["generate", planted, str(photo), QUESTION])
    model, processor = load_with_processor(planted)
    images = [[Image.open(photo)]]
    with pytest.raises(UserError, match=LOGITS):
        answer(model, processor=processor, questions=[QUESTION], images=images, max_new_tokens=5)


def test_answers_of_validation_are_refused(planted, parts, photo):
    module = LlavaTraining(parts[0], parts[1], ["adapter"])
    module.model, module.processor = load_with_processor(planted)
    ids = torch.tensor([[1, 5, 6]])
    prompts = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(1, 3, 8, 8),
    }
    with pytest.raises(UserError, match=LOGITS):
        module.answer(prompts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found_and_the_first_site_named(dtype, value):
    finite = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    check_outputs("states", {"a": finite, "b": finite[:0]})
    broken = finite.clone()
    broken[1, 2] = value
    with pytest.raises(UserError, match="states at b are NaN"):
        check_outputs("states", {"a": finite, "b": broken, "c": broken})
