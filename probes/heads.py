"""What reads a class off a token's state. Shapes: B images, T tokens, d width, K classes."""

from torch import Tensor, nn

# Normalisations without parameters of their own, so that a probe stays linear in what it is given.
FEATURE_NORMS = {
    "none": lambda width: nn.Identity(),
    "batchnorm": lambda width: nn.BatchNorm1d(width, affine=False),
    "layernorm": lambda width: nn.LayerNorm(width, elementwise_affine=False),
}


class LinearProbe(nn.Module):
    """One linear layer from a site's width to the classes, as the paper's (App. A.2).

    Args:
        width: d of the site.
        classes: K.
        feature_norm: "none" (the paper), or "batchnorm" or "layernorm" before the linear layer: without, AdamW at one
            learning rate trains sites of different scale to different degrees.
    """

    def __init__(self, width: int, classes: int, feature_norm: str = "none"):
        super().__init__()
        if feature_norm not in FEATURE_NORMS:
            raise ValueError(f"unknown feature_norm {feature_norm!r}; there is {', '.join(FEATURE_NORMS)}")
        self.norm = FEATURE_NORMS[feature_norm](width)
        self.linear = nn.Linear(width, classes)

    def forward(self, states: Tensor) -> Tensor:
        """f[B, T, d] -> logits f[B, T, K]."""
        batch, tokens, width = states.shape
        return self.linear(self.norm(states.reshape(-1, width)).view(batch, tokens, width))
