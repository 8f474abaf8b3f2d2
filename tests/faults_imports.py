"""What the server of faults.py imports before it forks: all that `probes` imports when a command runs."""

import sklearn.metrics
import sklearn.neighbors
import torch
import torch.utils.tensorboard
import umap

import probes.analyses.knockout
import probes.analyses.maps
import probes.analyses.starvation
import probes.analyses.umap
import probes.report.explorer
import probes.report.page
import probes.training

torch.set_num_threads(1)
__all__ = ["probes", "sklearn", "torch", "umap"]
