"""What reads a class off a token's state. Shapes: B images, T = h * w tokens, d width, K classes, R ranks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_bidir.common.errors import UserError

from .distributed import all_gather, rank_count


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation f[N, d] -> f[N, d] over the batches of all ranks, without parameters.

    What `nn.SyncBatchNorm` computes, on any backend (torch's wants GPUs). It passes no gradient on to its input between
    ranks and needs none: frozen states go in.
    """

    def __init__(self, width: int):
        super().__init__(width, affine=False)

    def forward(self, states: Tensor) -> Tensor:
        if not self.training or rank_count() == 1:
            return super().forward(states)
        gathered = all_gather(self._moments(states))
        count, mean, variance = (
            gathered[:, :1],
            gathered[:, 1 : 1 + self.num_features],
            gathered[:, -self.num_features :],
        )
        total = count.sum()
        overall = (count * mean).sum(0) / total
        squares = (count * (variance + (mean - overall).square())).sum(0)
        self.num_batches_tracked += 1
        self.running_mean.lerp_(overall.to(self.running_mean), self.momentum)
        self.running_var.lerp_((squares / (total - 1)).to(self.running_var), self.momentum)
        to = lambda x: x.to(states.dtype)
        return F.batch_norm(states, to(overall), to(squares / total), eps=self.eps)

    def _moments(self, states: Tensor) -> Tensor:
        """Number, mean and variance of this rank's states, f64[1 + 2 d]: few numbers, so that ranks wait but once."""
        if not len(states):
            return states.new_zeros(1 + 2 * self.num_features, dtype=torch.float64)
        variance, mean = torch.var_mean(states, 0, correction=0)
        return torch.cat([mean.new_full((1,), len(states)), mean, variance]).double()


# Normalisations without parameters of their own, so that a linear probe stays linear in what it is given.
FEATURE_NORMS = {
    "none": lambda width: nn.Identity(),
    "batchnorm": BatchNorm,
    "layernorm": lambda width: nn.LayerNorm(width, elementwise_affine=False),
}


HIDDEN = 1024  # of the mlp, see HEADS


class GridConv(nn.Module):
    """A 3 x 3 convolution over tokens f[B, T, d] that lie on a grid (h, w), zeros beyond its edge."""

    def __init__(self, width: int, classes: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = tuple(grid)
        self.conv = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, states: Tensor) -> Tensor:
        return self.conv(states.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)


# name -> a module f[B, T, d] -> f[B, T, K], from width, classes and grid. B may be 0: a rank without an image.
# linear  the paper's (App. A.2)
# mlp     two layers: what a token's state holds that no hyperplane separates. Its hidden layer has one width at all
#         sites, so that capacity does not grow with the site's: encoder and layers are compared. (And 34 sites of a 7B
#         model with gradients and moments are 2.4 GB at 1,024; at d they would be 9.)
# conv    a linear probe that sees a token's eight neighbours, too
HEADS = {
    "linear": lambda width, classes, grid: nn.Linear(width, classes),
    "mlp": lambda width, classes, grid: nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, classes)),
    "conv": GridConv,
}


class Probe(nn.Module):
    """A normalisation of the states and a head: f[B, T, d] -> logits f[B, T, K].

    Args:
        width: d of the site.
        classes: K.
        grid: (h, w) of the tokens.
        feature_norm: "none" (the paper), or "batchnorm" or "layernorm" before the head: without, AdamW at one learning
            rate trains sites of different scale to different degrees.
        head: Name of one of HEADS; "linear" is the paper's.

    Raises:
        UserError: On the first states, if the head gives no K logits a token.
    """

    def __init__(
        self, width: int, classes: int, grid: tuple[int, int], feature_norm: str = "none", head: str = "linear"
    ):
        super().__init__()
        self.norm = FEATURE_NORMS[feature_norm](width)
        self.head = HEADS[head](width, classes, grid)
        self._name, self._classes = head, classes  # for what a wrong head is told

    def forward(self, states: Tensor) -> Tensor:
        batch, tokens, width = states.shape
        logits = self.head(self.norm(states.reshape(-1, width)).view(batch, tokens, width))
        expected = (batch, tokens, self._classes)
        if logits.shape != expected:
            raise UserError(
                f"head {self._name!r} gives logits of {tuple(logits.shape)}; expected [B, T, K] = {expected}"
            )
        return logits
