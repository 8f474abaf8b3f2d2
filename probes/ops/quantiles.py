"""Quantiles of Student's t and of the normal distribution, to the last bit those of scipy.stats.

Importing scipy.stats takes two thirds of the time of importing torch, scipy.special a tenth.
"""

from scipy import special


def student_quantile(probability: float, degrees: float) -> float:
    """Return the quantile of Student's t distribution with so many degrees of freedom."""
    return float(special.stdtrit(degrees, probability))


def normal_quantile(probability: float) -> float:
    """Return the quantile of the standard normal distribution."""
    return float(special.ndtri(probability))
