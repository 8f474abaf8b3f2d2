"""A publisher's own linear head, which `probes fit --head FILE` scores: no training, and so no noise of training.

The files are DINOv2's, *_ade20k_linear_head.pth and the like, and what mmsegmentation saves of the same head: batch
norm and a 1 x 1 convolution on the states of one site. They are read without running code.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import is_finite
from probes.config import ModelOptions
from probes.models.families import family_of
from probes.models.read_config import read_config

# name in the file -> name in a probe of the kind `PROBE`
NAMES = {
    "decode_head.bn.weight": "norm.weight",
    "decode_head.bn.bias": "norm.bias",
    "decode_head.bn.running_mean": "norm.running_mean",
    "decode_head.bn.running_var": "norm.running_var",
    "decode_head.bn.num_batches_tracked": "norm.num_batches_tracked",
    "decode_head.conv_seg.weight": "head.weight",
    "decode_head.conv_seg.bias": "head.bias",
}
PROBE = {"head": "linear", "feature_norm": "batchnorm_affine"}


def is_published(head: str) -> bool:
    """Return whether `model.head` is a file of weights, not the name of a kind of head."""
    return Path(head).suffix in (".pth", ".pt") or Path(head).is_file()


def read_published(head: str) -> dict[str, Tensor]:
    """Return the weights of a published head by their names in a probe.

    Raises:
        UserError: The file cannot be read, or has other weights than those of a linear head, or some not finite.
    """
    try:
        content: Any = torch.load(head, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"model.head {head}: there is no such file") from None
    except Exception as error:  # of the unpickler, of many kinds
        reason = str(error).split("\n")[0]
        raise UserError(f"model.head {head} is no torch file of tensors alone: {reason}") from None
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or content.keys() != NAMES.keys():
        names = {*content} if isinstance(content, dict) else set()
        differs = sorted(map(str, names ^ NAMES.keys())) or ["its kind"]
        raise UserError(
            f"model.head {head} is no linear head of DINOv2's format: expected {', '.join(NAMES)}; {differs[0]} differs"
        )
    if broken := [name for name, tensor in content.items() if not is_finite(tensor)]:
        raise UserError(f"model.head {head} has values that are not finite in {broken}")
    weights = {NAMES[name]: tensor for name, tensor in content.items()}
    weights["head.weight"] = weights["head.weight"].flatten(1)
    return weights


def check_published(model: ModelOptions) -> None:
    """Raise a UserError unless a published head fits the one site that a run reads.

    Args:
        model: Options, whose `head` is a file.
    """
    width = read_published(model.head)["head.weight"].shape[1]
    if not isinstance(model.sites, list) or len(model.sites) != 1:
        raise UserError(
            f"model.head {model.head} is of one site; name it: --model.sites '[final_norm]', DINOv2's own"
        )
    config = read_config(model.mllm, trust=model.trust)
    expected = family_of(config).widths(config).get(model.sites[0], width)
    if width != expected:
        raise UserError(
            f"model.head {model.head} reads {width} channels, but {model.sites[0]} has {expected}; expected a head of "
            "one layer of this model (+ms and linear4 read four)"
        )
