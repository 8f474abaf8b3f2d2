"""Tolerances for two ways to compute the same numbers.

Bit equality is for runs of the same kernels on the same shapes. Another path, another batch or another CPU sums in
another order, and each sum is then rounded differently.
"""

from torch import Tensor, finfo
from torch.testing import assert_close

# A layer has about eight sums in series: norm, projection, scores, values, projection, norm, two products of the MLP.
# The roundings of a sum of 64 terms add up to about 8 eps of its largest term. Residual connections add up the layers.
ROUNDINGS_PER_LAYER = 8 * 8


def rounding(expected: Tensor, layers: int) -> dict[str, float]:
    """Return `rtol` and `atol` for a tensor that is `layers` layers away from where two computations were equal.

    The errors are relative to the largest element, because an element may be a small difference of large terms.
    """
    eps = finfo(expected.dtype).eps if expected.is_floating_point() else 0
    return {"rtol": 0, "atol": ROUNDINGS_PER_LAYER * layers * eps * expected.abs().max().item()}


def assert_near(actual: Tensor, expected: Tensor, layers: int) -> None:
    """Compare two tensors within :func:`rounding` of the expected one."""
    assert_close(actual, expected, **rounding(expected, layers))
