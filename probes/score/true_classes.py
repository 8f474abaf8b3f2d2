"""The majority class under each image token, for a model's grid."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probes.data.batches import group_by_size
from probes.ops.pixel_counts import patch_labels

if TYPE_CHECKING:  # a report needs no model
    from probes.models.frozen_mllm import FrozenMLLM


def true_classes(targets: Tensor | list[Tensor], classes: int, mllm: "FrozenMLLM") -> Tensor:
    """Return the majority class under each token, i64[B, T], -1 if no pixel is labelled; see :func:`patch_labels`."""
    truth = torch.empty(len(targets), mllm.image_tokens, dtype=torch.long)
    for images, target in group_by_size(targets):
        view = mllm.geometry.view(target.shape[1:])
        truth[images] = patch_labels(target, classes, mllm.grid, view=view)
    return truth
