"""A small vision transformer of one's own, of no class of transformers, and functions that describe it."""

import torch
from torch import Tensor, nn

import probes

WIDTH = 16
PATCH_PX = 8
SIDE_PX = 32
EXTRA = 2
MEAN = [0.5, 0.4, 0.3]
STD = [0.5, 0.6, 0.7]


class Block(nn.Module):
    """A pre-norm layer, written out."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Return the states f[B, N, d] after attention and MLP."""
        normed = self.norm1(states)
        states = states + self.attn(normed, normed, normed)[0]
        return states + self.mlp(self.norm2(states))


class Encoder(nn.Module):
    """A vision transformer with two tokens before the patches, or after them, which returns the first of all."""

    def __init__(self, new_block=Block, extra_last: bool = False):
        super().__init__()
        self.extra_last = extra_last
        self.stem = nn.Conv2d(
            in_channels=3, out_channels=WIDTH, kernel_size=PATCH_PX, stride=PATCH_PX
        )
        self.extra = nn.Parameter(torch.randn(1, EXTRA, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, (SIDE_PX // PATCH_PX) ** 2, WIDTH))
        self.blocks = nn.ModuleList(new_block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def embed(self, pixels: Tensor) -> Tensor:
        """Return what the first block reads."""
        patches = self.stem(pixels).flatten(2).transpose(1, 2) + self.positions
        tokens = [self.extra.expand(len(pixels), -1, -1), patches]
        return torch.cat(tokens[::-1] if self.extra_last else tokens, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the normed first token f[B, d]."""
        states = self.embed(pixels)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)[:, 0]


def torch_layer() -> nn.Module:
    """Return a layer of torch, whose MLP is no module of its own."""
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True, norm_first=True)


def describe(encoder: nn.Module, **parts: str) -> probes.EncoderModule:
    """Return an encoder as `probes` reads it."""
    return probes.EncoderModule(
        encoder,
        preprocess=(MEAN, STD),
        patch=PATCH_PX,
        layers="blocks",
        norm="norm",
        parts=parts,
        image_px=SIDE_PX,
    )


def build() -> probes.EncoderModule:
    """Return an encoder whose attention and MLP are named."""
    torch.manual_seed(0)
    return describe(Encoder(), attn="attn", mlp="mlp")


def build_closed() -> probes.EncoderModule:
    """Return one whose attention and MLP are not."""
    torch.manual_seed(0)
    return describe(Encoder(torch_layer))
