"""Every encoder of the table that takes a square's pixels: what the adapter reads, pixels, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny_encoders
import torch
from transformers import CLIPVisionModel

import llava_bidir
import probes
from llava_bidir.common.encoders import ENCODERS
from llava_bidir.common.errors import UserError
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.export import as_llava, export_hf
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.model.trainable import set_trainable

NO_SQUARE = ("siglip2", "siglip2_vision_model", "vit_mae", "sapiens2")
AT_EVERY_CHANGE = ("clip", "dinov3_vit", "radio", "metaclip_2_vision_model")
KINDS = [
    name if name in AT_EVERY_CHANGE else pytest.param(name, marks=pytest.mark.nightly)
    for name in tiny_encoders.STOCK
    if name not in NO_SQUARE
]
WITHOUT_NORM = ("radio",)
# published in preprocessor_config.json, first channel
PUBLISHED = {
    "clip": (0.48145466, 0.26862954),
    "siglip": (0.5, 0.5),
    "dinov2": (0.485, 0.229),
    "dinov2_registers": (0.485, 0.229),
    "dinov3": (0.485, 0.229),
    "radio": (0.0, 1.0),
    "tipsv2": (0.0, 1.0),
}


class Folders(dict):
    """Checkpoints by kind, written when they are asked for."""

    def __init__(self, root: Path):
        self.root = root

    def __missing__(self, name: str) -> str:
        self[name] = tiny_encoders.STOCK[name].write(self.root / name)
        return self[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return Folders(tmp_path_factory.mktemp("encoders"))


def built(encoder: Encoder, llm: str) -> LlavaBidirForConditionalGeneration:
    torch.manual_seed(0)
    return build_model(encoder, llm, build_processor(encoder, llm)).eval()


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_adapter_reads_each_patch_and_neither_cls_nor_registers(name, parts, folders, tmp_path):
    """To the last bit: of the layer, of the layer after the final norm, and of what is written and read again."""
    stock = tiny_encoders.STOCK[name]
    pixels = torch.randn(2, 3, tiny_encoders.STORED_PX, tiny_encoders.STORED_PX)
    tower = stock.cls.from_pretrained(folders[name]).eval()
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, stock.extra_tokens :]
    expected = {False: hidden}
    if name not in WITHOUT_NORM:
        expected[True] = tower.get_submodule(ENCODERS[name].norm)(hidden)
    for norm, states in expected.items():
        side = tiny_encoders.STORED_PX if ENCODERS[name].trained_px else None
        model = built(Encoder(path=folders[name], norm=norm, image_px=side), parts[1])
        assert states.shape[1] == model.config.image_seq_length == 36
        projector = model.model.multi_modal_projector
        read = Mock(return_value=None)
        handle = projector.linear_1.register_forward_pre_hook(read)
        model.get_image_features(pixels)
        handle.remove()
        assert torch.equal(read.call_args.args[1][0], states)
        model.save_pretrained(tmp_path / f"{norm}")
        again = LlavaBidirForConditionalGeneration.from_pretrained(tmp_path / f"{norm}").eval()
        outputs = (x.get_image_features(pixels).pooler_output for x in (again, model))
        for one, other in zip(*outputs, strict=True):
            assert torch.equal(one, other)
        if stock.extra_tokens > 1 and not norm:
            with pytest.raises(UserError, match="register tokens, which stock LLaVA would treat"):
                as_llava(model)
        if norm:
            with pytest.raises(UserError, match="after its final norm, which stock LLaVA leaves"):
                as_llava(model)


@torch.no_grad()
def test_probes_read_an_export_at_the_side_of_its_training(parts, folders, tmp_path):
    """Also where the config has the side of the stored positions only; after the final norm, if it is applied."""
    for name, norm in (("radio", False), ("dinov3_vit", True)):
        encoder = Encoder(path=folders[name], image_px=32, norm=norm)
        processor = build_processor(encoder, parts[1])
        model = build_model(encoder, parts[1], processor).eval()
        export_hf(model, processor=processor, out=tmp_path / name)
        mllm = probes.load(str(tmp_path / name), device="cpu")
        assert mllm.geometry.image_px == 32 and mllm.grid == (8, 8)
        pixels = torch.randn(1, 3, 32, 32)
        tower = model.model.vision_tower
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
        hidden = hidden[:, tiny_encoders.STOCK[name].extra_tokens :]
        if norm:
            hidden = tower.get_submodule(ENCODERS[name].norm)(hidden)
        assert torch.equal(mllm.states(pixels, ["encoder"])["encoder"], hidden)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_trains_what_its_layer_depends_on(name, parts, folders):
    """With the final norm where it is applied; every weight that trains has a gradient, DDP waits for no other."""
    norm = name not in WITHOUT_NORM
    side = tiny_encoders.STORED_PX if ENCODERS[name].trained_px else None
    model = built(Encoder(path=folders[name], norm=norm, image_px=side), parts[1])
    set_trainable(model, ["encoder", "adapter", "llm"])
    pixels = torch.randn(1, 3, tiny_encoders.STORED_PX, tiny_encoders.STORED_PX)
    torch.cat(model.get_image_features(pixels).pooler_output).square().sum().backward()
    tower = dict(model.model.vision_tower.named_parameters())
    trained = {key for key, p in tower.items() if p.requires_grad}
    assert trained == {key for key, p in tower.items() if p.grad is not None}
    layers = model.model.vision_tower.get_submodule(ENCODERS[name].layers)
    assert [layer[0].requires_grad for layer in map(lambda x: [*x.parameters()], layers)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("name", NO_SQUARE)
def test_towers_that_take_no_square_are_refused_by_name(name, folders):
    with pytest.raises(UserError, match=r"does not take the pixels of a square|expected a square"):
        Encoder(path=folders[name]).load_config()


def test_what_an_encoder_lacks_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="has no final norm"):
        Encoder(path=folders["radio"], norm=True).load_config()
    for name in ("vit", "aimv2_vision_model", "mlcd_vision_model"):
        with pytest.raises(UserError, match="takes 24 px only"):
            Encoder(path=folders[name], image_px=32).load_config()
    for path in ("", "timm:vit_pe_core_large_patch14_336"):
        with pytest.raises(UserError, match="model.encoder.path: expected a directory or hub id"):
            Encoder(path=path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_pixels_are_those_of_the_checkpoint_or_else_the_published_ones(name, folders, tmp_path):
    encoder = Encoder(name, str(tmp_path))
    mean, std = encoder.pixel_statistics()
    assert (mean[0], std[0]) == PUBLISHED[name]
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    assert encoder.pixel_statistics() == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert encoder.pixel_statistics()[0] == (0, 0, 0)


def test_an_encoder_of_ones_own_is_registered_for_both_packages(parts, folders, tmp_path):
    config_file = tmp_path / "mine/config.json"
    with pytest.raises(UserError, match="registered already"):
        llava_bidir.register_encoder("clip_vision_model", ENCODERS["clip_vision_model"])

    class MineConfig(CLIPVisionModel.config_class):
        model_type = "mine_vision"

    class Mine(CLIPVisionModel):
        config_class = MineConfig

    from transformers import AutoConfig, AutoModel

    AutoConfig.register("mine_vision", MineConfig)
    AutoModel.register(MineConfig, Mine)
    folder = tmp_path / "mine"
    CLIPVisionModel.from_pretrained(folders["clip_vision_model"]).save_pretrained(folder)
    config = json.loads(config_file.read_text()) | {"model_type": "mine_vision"}
    config_file.write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 24})
    )
    kind = replace(ENCODERS["clip_vision_model"], model_class=Mine)
    llava_bidir.register_encoder("mine_vision", kind)
    try:
        model = built(Encoder(path=str(folder)), parts[1])
        pixels = torch.randn(1, 3, 24, 24)
        with torch.no_grad():
            states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
            probed = probes.load(str(folder)).states(pixels, ["layer_02"])["layer_02"]
        torch.testing.assert_close(probed, states[:, 1:])
    finally:
        del ENCODERS["mine_vision"]
