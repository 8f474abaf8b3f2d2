"""Every family at its published sizes, from config numbers with their sources, without allocating weights.

Widths, heads, image sizes and kinds of layers are the published ones. Of the layers only a few run: one of each kind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, CLIPImageProcessorPil, PreTrainedConfig
from transformers.initialization import no_init_weights

from probes import Knockout
from probes.models.attention_masks import mask_backend
from probes.models.families import FAMILIES, family_of, own_image_attention
from probes.models.families.encoders import ENCODERS
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.read_config import check_numbers

PUBLISHED = yaml.safe_load((Path(__file__).parent / "published_families.yaml").read_text())
MODELS = PUBLISHED["models"]
WITHOUT_MASKS = ("qwen3_5", "qwen3_5_moe", "lfm2_vl")  # linear attention, convolutions
# that run at least: Qwen3-VL adds features of three encoder layers after as many decoder layers
LAYERS = 3
PREFIX = [1, 2, 3, 4, 5]
SEPARATOR = 12
IMAGES = 2
FAST = ("google/paligemma2-3b-pt-224",)  # what was wrong once

INDEXED_BY = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


class FakeWeights(TorchDispatchMode):
    """Run what touches a fake tensor in `fake`, and all else as it is.

    FakeTensorMode alone would make ids and masks fake, too, and with them each number of tokens that depends on one.
    Build the model in `fake`, and run it in this mode.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self,
        func,
        types,
        args=(),
        kwargs=None,
    ):
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # a check of values, of which there are none
        if func in INDEXED_BY:
            args = (args[0], _numbers(args[1]), *args[2:])
        with self.fake:
            return func(*args, **kwargs)


def _numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Return indices with real masks replaced by the positions of their True values, so that the number is known."""
    numbers: list[Tensor | None] = []
    for index in indices:
        is_mask = (
            index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        )
        numbers += index.nonzero().unbind(1) if is_mask else [index]
    return numbers


def config_of(entry: dict) -> PreTrainedConfig:
    encoder = PUBLISHED["encoders"][entry["encoder"]]
    llm = PUBLISHED["llms"][entry["llm"]]
    vision = dict(encoder["config"])
    text = dict(llm["config"])
    further = entry.get("config", {})
    if "period" in llm:
        text["layer_types"] = llm["period"] * (text["num_hidden_layers"] // len(llm["period"]))
        further = {"audio_config": None}
    return AutoConfig.for_model(
        entry["family"],
        vision_config=vision,
        text_config=text,
        **further,
    )


def cut_layers(config: PreTrainedConfig) -> None:
    """Leave LLM layers of each kind, and a few encoder layers unless the config names some by their number."""
    text = config.get_text_config()
    vision = config.vision_config
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    layers = max(LAYERS, max(kinds.index(kind) for kind in kinds) + 1)
    if getattr(text, "num_kv_shared_layers", 0):  # the later half uses keys of the earlier one
        text.num_kv_shared_layers = layers
        layers = 2 * layers
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = kinds[:layers]
    if getattr(vision, "deepstack_visual_indexes", None):
        vision.deepstack_visual_indexes = list(range(LAYERS))
    if config.model_type != "vipllava":
        setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", LAYERS)


def linspace_with_values(start: float, end: float, steps: int, **_) -> np.ndarray:
    """The constructor of Qianfan-OCR's encoder reads the values of torch.linspace, and fake tensors have none."""
    return np.linspace(start, end, steps)


@contextmanager
def load(entry: dict) -> Iterator[FrozenMLLM]:
    """A model as `probes.load` makes it; in the context, weights and what is computed from them have no values."""
    config = config_of(entry)
    weights = FakeWeights()
    cut_layers(config)
    family = family_of(config)
    backend = mask_backend(config.get_text_config())
    with weights.fake, no_init_weights(), pytest.MonkeyPatch.context() as patch:
        if config.model_type == "qianfan_ocr":
            patch.setattr(torch, "linspace", linspace_with_values)
        model = family.model_cls._from_config(
            config, attn_implementation=backend, dtype=torch.bfloat16
        )
    assert all(isinstance(parameter, FakeTensor) for parameter in model.parameters())
    processors = [CLIPImageProcessorPil()] * len(family.normalisations)
    prefix = [] if family.own_template else PREFIX
    separator = SEPARATOR if family.row_separator else None
    with weights:
        attention = own_image_attention(config)
        yield FrozenMLLM(model, family, processors, prefix, attention, separator_id=separator)


def test_every_family_has_a_published_model():
    """Bare encoders have no published table of their own: test_frozen_encoder.py compares them with stock models."""
    assert {entry["family"] for entry in MODELS.values()} == FAMILIES.keys() - ENCODERS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_numbers_of_a_config(name):
    """At the published depth, without a model."""
    entry = MODELS[name]
    config = config_of(MODELS[name])
    family = family_of(config)
    check_numbers(name, family, config)
    assert (family.grid(config), family.image_px(config)) == (
        (entry["side"],) * 2,
        entry["image_px"],
    )
    assert family.encoder_width(config) == entry["encoder_width"]
    assert family.covered_px(config) == entry.get("covered_px", entry["image_px"])
    assert own_image_attention(config) == entry.get("image_attention", "causal")
    published = PUBLISHED["llms"][entry["llm"]]["config"]
    text = config.get_text_config()
    assert all(
        getattr(text, key) == published[key]
        for key in ("hidden_size", "num_hidden_layers")
        if key in published
    )


@pytest.mark.parametrize("name", PUBLISHED["refused"])
def test_unreadable_configs_are_refused(name):
    config = config_of(PUBLISHED["refused"][name])
    with pytest.raises(ValueError, match=PUBLISHED["refused"][name]["message"]):
        check_numbers(name, family_of(config), config)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.nightly) for name in MODELS],
)
def test_states_have_the_published_sizes(name):
    entry = MODELS[name]
    tokens = entry["side"] ** 2
    blocked = torch.arange(tokens).expand(IMAGES, -1) == tokens // 2
    knockout = Knockout(blocked, [2]) if entry["family"] not in WITHOUT_MASKS else None
    with load(entry) as mllm:
        side = mllm.geometry.image_px
        pixels = torch.ones(IMAGES, 3 * len(mllm.image_processors), side, side)
        states = mllm.states(pixels, knockout=knockout)
        width = mllm.model.config.get_text_config().hidden_size
        expected = dict.fromkeys(mllm.sites, (IMAGES, tokens, width))
        expected["encoder"] = (IMAGES, tokens, entry["encoder_width"])
        assert {site: tuple(state.shape) for site, state in states.items()} == expected
        assert int(mllm.is_image.sum()) == tokens
