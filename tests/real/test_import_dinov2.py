"""An ONNX file with a DINOv2 as a Hugging Face directory: equal weights; other files are errors."""

import re

import pytest
import torch
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model

from experiments.real.import_dinov2 import import_dinov2
from llava_bidir.common.errors import UserError

onnx = pytest.importorskip("onnx", reason="needs the package onnx: pip install onnx")
# Names of attention's weights in transformers 4, which files have, by those of transformers 5.
FORMER = {
    r"\.attention\.(q|k|v)_proj": r".attention.attention.\1_proj",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    r"\.attention\.o_proj": ".attention.output.dense",
}


@pytest.fixture(scope="module")
def dinov2():
    """Return a tiny model with the proportions that every DINOv2 has: heads of 64, an MLP of four widths."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = Dinov2Model(
        Dinov2Config(
            **settings,
            image_size=56,
            patch_size=14,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.embeddings.mask_token.zero_()
    return model


def former_name(name: str) -> str:
    for pattern, replacement in FORMER.items():
        name = re.sub(pattern, replacement, name)
    return f"backbone.{name}"


def write_graph(model, file, biases: bool = True) -> None:
    """Write weights as torch.onnx.export does: matrices without a name and transposed, positions folded."""
    helper = onnx.helper
    arrays = {}
    nodes = []
    for name, parameter in model.named_parameters():
        arrays[former_name(name)] = parameter.detach().numpy()
    positions = arrays.pop("backbone.embeddings.position_embeddings")
    arrays["onnx::Concat_1"] = positions[:, :1]
    arrays["onnx::Concat_2"] = positions[:, 1:]
    arrays.pop("backbone.embeddings.mask_token")
    matrices = [name for name, x in arrays.items() if x.ndim == 2]
    for i, name in enumerate(matrices):
        bias = name.removesuffix("weight") + "bias"
        arrays[f"onnx::MatMul_{i}"] = arrays.pop(name).T
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"onnx::MatMul_{i}"], [f"y{i}"]))
        if biases:
            nodes.append(helper.make_node("Add", [bias, f"y{i}"], [f"z{i}"]))
    tensors = [onnx.numpy_helper.from_array(x.copy(), name) for name, x in arrays.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), file)


def test_weights_sizes_and_states_are_those_of_the_model(dinov2, tmp_path):
    write_graph(dinov2, tmp_path / "graph.onnx")
    import_dinov2(tmp_path / "graph.onnx", tmp_path / "out")
    loaded = Dinov2Model.from_pretrained(tmp_path / "out").eval()
    expected = dinov2.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    pixels = torch.randn(
        1,
        3,
        42,
        42,
        generator=torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        assert torch.equal(loaded(pixels).last_hidden_state, dinov2(pixels).last_hidden_state)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (256, 224)
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


def test_a_matrix_without_a_name_is_an_error(dinov2, tmp_path):
    write_graph(dinov2, tmp_path / "nameless.onnx", biases=False)
    with pytest.raises(UserError, match=r"nameless.onnx has no DINOv2.*has no bias of that height"):
        import_dinov2(tmp_path / "nameless.onnx", tmp_path / "out")
