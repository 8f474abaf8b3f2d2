"""Cosine similarity between a state and a direction per class: `--model.head cosine`."""

from torch import nn
from torch.nn.functional import normalize

import probes


class Cosine(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.directions = nn.Linear(width, classes, bias=False)

    def forward(self, states):
        directions = normalize(self.directions.weight, dim=-1)
        return 10 * normalize(states, dim=-1) @ directions.T


probes.register_head("cosine", lambda width, classes, grid: Cosine(width, classes))
