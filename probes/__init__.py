"""Layer-by-layer segmentation probes for frozen MLLMs, and the analyses of arXiv 2603.17228."""

from .knockout import Knockout
from .loss import upsampled_cross_entropy
from .mllm import FrozenMLLM, load

__all__ = ["FrozenMLLM", "Knockout", "load", "upsampled_cross_entropy"]
