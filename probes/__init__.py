"""Layer-by-layer segmentation probes for frozen MLLMs, and the analyses of arXiv 2603.17228.

Public names are imported on first use, so that `import probes` and `probes --help` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from llava_bidir import __version__ as __version__

if TYPE_CHECKING:  # for editors and type checkers; the same names as in `_MODULES`
    from .analyses.analysis import Analysis as Analysis
    from .analyses.analysis import Claim as Claim
    from .analyses.analysis import Result as Result
    from .analyses.analysis import RunOptions as RunOptions
    from .analyses.charts import Chart as Chart
    from .analyses.charts import Curve as Curve
    from .analyses.charts import Point as Point
    from .analyses.claims import register_analysis as register_analysis
    from .analyses.claims import write_effects as write_effects
    from .data.image_dataset import SegmentationDataset as SegmentationDataset
    from .data.registry import register_dataset as register_dataset
    from .heads import Probe as Probe
    from .heads import register_head as register_head
    from .models.families import EncoderFamily as EncoderFamily
    from .models.families import Family as Family
    from .models.families import register_family as register_family
    from .models.features import pca_colours as pca_colours
    from .models.frozen_encoder import FrozenEncoder as FrozenEncoder
    from .models.frozen_mllm import FrozenMLLM as FrozenMLLM
    from .models.knockout import Knockout as Knockout
    from .models.load import load as load
    from .models.own_module import EncoderModule as EncoderModule
    from .ops.cross_entropy import upsampled_cross_entropy as upsampled_cross_entropy
    from .ops.quadrature import prepare_masks as prepare_masks
    from .runs.read import ProbeRun as ProbeRun
    from .score.estimate import Estimate as Estimate
    from .solve.features import solve_features as solve_features
    from .studies.run import study as study
    from .studies.table import Study as Study
    from .tasks import Segmentation as Segmentation
    from .tasks import Task as Task
    from .tasks import register_task as register_task

_MODULES = {
    "load": ".models.load",
    "FrozenMLLM": ".models.frozen_mllm",
    "Knockout": ".models.knockout",
    "pca_colours": ".models.features",
    "FrozenEncoder": ".models.frozen_encoder",
    "Family": ".models.families",
    "EncoderFamily": ".models.families",
    "EncoderModule": ".models.own_module",
    "register_family": ".models.families",
    "SegmentationDataset": ".data.image_dataset",
    "register_dataset": ".data.registry",
    "Probe": ".heads",
    "register_head": ".heads",
    "ProbeRun": ".runs.read",
    "Analysis": ".analyses.analysis",
    "Claim": ".analyses.analysis",
    "Result": ".analyses.analysis",
    "RunOptions": ".analyses.analysis",
    "Chart": ".analyses.charts",
    "Curve": ".analyses.charts",
    "Point": ".analyses.charts",
    "Estimate": ".score.estimate",
    "register_analysis": ".analyses.claims",
    "write_effects": ".analyses.claims",
    "study": ".studies.run",
    "Study": ".studies.table",
    "Segmentation": ".tasks",
    "Task": ".tasks",
    "register_task": ".tasks",
    "solve_features": ".solve.features",
    "prepare_masks": ".ops.quadrature",
    "upsampled_cross_entropy": ".ops.cross_entropy",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
