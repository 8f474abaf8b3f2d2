"""Imports of the server in fault_server.py: all that the commands of `probes` import when they run."""

import sklearn.metrics
import sklearn.neighbors
import torch
import torch.utils.tensorboard
import umap

import probes.analyses.knockout.cases
import probes.analyses.knockout.knockout_effects
import probes.fit.cli
import probes.report.page

torch.set_num_threads(1)
__all__ = ["probes", "sklearn", "torch", "umap"]
