"""Probe heads, which map states of tokens to class logits.

Legend: B images, T = h * w tokens, d width, K classes.
"""

from collections.abc import Callable

from torch import Tensor, nn

from llava_bidir.common.errors import UserError
from llava_bidir.common.imports import HINT, check_returned, check_shape, check_takes

# Normalisations without trainable parameters; a linear probe stays linear in the normalised states.
FEATURE_NORMS = {
    "none": lambda width: nn.Identity(),
    # over the batches of all ranks: of several, it needs GPUs
    "batchnorm": lambda width: nn.SyncBatchNorm(width, affine=False),
    "batchnorm_affine": nn.SyncBatchNorm,  # the exception: with a scale and a shift
    "layernorm": lambda width: nn.LayerNorm(width, elementwise_affine=False),
}

LINEAR = "linear"  # the paper's head, and the only one that is solved
HIDDEN = 1024  # width of the mlp, see HEADS


class GridConv(nn.Module):
    """A 3 x 3 convolution over tokens f[B, T, d] on a grid (h, w), with zero padding."""

    def __init__(self, width: int, classes: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = tuple(grid)
        self.conv = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits f[B, T, K]."""
        maps = states.transpose(1, 2).unflatten(2, self.grid)
        return self.conv(maps).flatten(2).transpose(1, 2)


# name -> factory (width, classes, grid) of a module f[B, T, d] -> f[B, T, K]. B may be 0: a rank without an image.
# linear  the paper's head (App. A.2)
# mlp     two layers, for information that is not linearly separable. The hidden width is the same at all sites, so that
#         capacity does not depend on the width of the site. (34 sites of a 7B model with gradients and moments need
#         2.4 GB at 1,024, and 9 GB at width d.)
# conv    a linear head on a token and its eight neighbours
HeadFactory = Callable[[int, int, tuple[int, int]], nn.Module]
HEADS: dict[str, HeadFactory] = {
    LINEAR: lambda width, classes, grid: nn.Linear(width, classes),
    "mlp": lambda width, classes, grid: nn.Sequential(
        nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, classes)
    ),
    "conv": GridConv,
}


def register_head(name: str, factory: HeadFactory) -> None:
    """Add a probe head under a new name for `model.head`; commands get it by `--import FILE.py`.

    Args:
        name: Name of the head.
        factory: Called with width d, classes K and grid (h, w); returns a module f[B, T, d] -> f[B, T, K], B >= 0.

    Raises:
        UserError: If the name is taken, or the factory takes other arguments.
    """
    if name in HEADS:
        raise UserError(f"the head name {name!r} is taken; choose another name")
    check_takes(factory, "width", "classes", "grid")
    HEADS[name] = factory


def factory_of(name: str) -> HeadFactory:
    """Return the factory of a head; raise a UserError if there is none."""
    if name not in HEADS:
        raise UserError(f"model.head is {name!r}; expected one of {', '.join(HEADS)}; {HINT}")
    return HEADS[name]


class Probe(nn.Module):
    """A normalisation of the states and a head: f[B, T, d] -> logits f[B, T, K].

    Args:
        width: d of the site.
        classes: K.
        grid: (h, w) of the tokens.
        feature_norm: "none" (the paper), "batchnorm" or "layernorm" before the head. Without normalisation, the
            progress of AdamW at one learning rate depends on the scale of the site.
        head: A name in HEADS; "linear" is the paper's.
        dropout: Probability that a channel of an image is 0 in training.
        init_std: Standard deviation of the head's weights, whose biases are 0; None: as torch draws them.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        grid: tuple[int, int],
        feature_norm: str = "none",
        head: str = LINEAR,
        dropout: float | None = None,
        init_std: float | None = None,
    ):
        super().__init__()
        self.dropout = nn.Dropout1d(dropout or 0.0)
        self.norm = FEATURE_NORMS[feature_norm](width)
        factory = factory_of(head)
        self.head = check_returned(factory, factory(width, classes, grid), nn.Module)
        self.name = head
        self.classes = classes
        if init_std is not None:
            for name, parameter in self.head.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=init_std)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits f[B, T, K] of states f[B, T, d]."""
        batch, tokens, width = states.shape
        states = self.dropout(states.transpose(1, 2)).transpose(1, 2)
        logits = self.head(self.norm(states.reshape(-1, width)).view(batch, tokens, width))
        return check_shape(f"head {self.name!r}", logits, (batch, tokens, self.classes))
