"""A transformer of your own: `probes study encoder.py:build DATA --out DIR`."""

import torch
from torch import nn

import probes


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, 8)
        self.places = nn.Parameter(torch.randn(16, 24))
        layer = nn.TransformerEncoderLayer(24, 3, 96, dropout=0, batch_first=True, norm_first=True)
        self.stack = nn.TransformerEncoder(layer, 4)

    def forward(self, pixels):
        return self.stack(self.stem(pixels).flatten(2).transpose(1, 2) + self.places)


def build():
    torch.manual_seed(0)  # in place of weights: module.load_state_dict(...)
    looks = {"patch": 8, "image_px": 32, "preprocess": ([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])}
    parts = {"attn": "self_attn", "mlp": "linear2"}
    return probes.EncoderModule(Encoder(), layers="stack.layers", parts=parts, **looks)
