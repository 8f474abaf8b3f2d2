"""Outlines of the objects and where their parts are, as points (u, v) of a quad."""

from typing import NamedTuple

GABLE = (
    (0, 0),
    (0.5, -0.18),
    (1, 0),
)
MIDDLE_BAR = (
    (0.5, 0),
    (0.5, 1),
)
CROSS_BAR = (
    (0, 0.45),
    (1, 0.45),
)
RIDGE = (
    (0, 0.6),
    (0.3, 0.42),
    (0.55, 0.68),
    (0.8, 0.5),
    (1, 0.65),
    (1, 1),
    (0, 1),
)
LAMP_CORD = (
    (0, 0),
    (0, 0.6),
)
LAMP_STAND = (
    (0.5, 0.98),
    (0.5, 0.1),
)
LAMP_SHADE = (
    (0.3, 0),
    (0.7, 0),
    (1, 1),
    (0, 1),
)
LIT_SIDE_OF_SHADE = (
    (0.3, 0),
    (0.5, 0),
    (0.5, 1),
    (0, 1),
)
PILLOW = (
    (0.1, 0),
    (0.9, 0),
    (1, 0.2),
    (1, 0.8),
    (0.9, 1),
    (0.1, 1),
    (0, 0.8),
    (0, 0.2),
)
TRUNK = (
    (0.45, 0.4),
    (0.55, 0.4),
    (0.58, 1),
    (0.42, 1),
)

# The right half of a person; the left one is its mirror image.
LEG = (
    (0.5, 0.54),
    (0.63, 0.54),
    (0.62, 0.98),
    (0.53, 0.98),
)
SHOE = (
    (0.53, 0.97),
    (0.62, 0.97),
    (0.65, 1),
    (0.53, 1),
)
SLEEVE = (
    (0.6, 0.23),
    (0.67, 0.27),
    (0.7, 0.54),
    (0.63, 0.54),
)
CHEST = (
    (0.5, 0.22),
    (0.6, 0.22),
    (0.64, 0.28),
    (0.63, 0.57),
    (0.5, 0.57),
)

# a car that heads right
CABIN = (
    (0.1, 0.7),
    (0.16, 0.49),
    (0.24, 0.44),
    (0.54, 0.44),
    (0.62, 0.47),
    (0.8, 0.7),
)
HULL = (
    (0.02, 0.9),
    (0, 0.79),
    (0.04, 0.68),
    (0.76, 0.67),
    (0.94, 0.71),
    (1, 0.79),
    (0.99, 0.91),
    (0.9, 0.93),
    (0.1, 0.93),
)
REAR_PANE = (
    (0.18, 0.67),
    (0.22, 0.51),
    (0.39, 0.5),
    (0.39, 0.67),
)
FRONT_PANE = (
    (0.44, 0.67),
    (0.44, 0.5),
    (0.57, 0.51),
    (0.71, 0.67),
)


class Crater(NamedTuple):
    """A round spot on the disc of the moon."""

    left: float
    top: float
    width: float


CRATERS = (
    Crater(0.22, 0.28, 0.24),
    Crater(0.5, 0.55, 0.28),
    Crater(0.6, 0.22, 0.16),
)


class Leaves(NamedTuple):
    """A disc of a tree's crown, with its middle at (u, v)."""

    u: float
    v: float
    radius: float
    brightness: float


# back to front
CROWN = (
    Leaves(0.25, 0.68, 0.3, 0.75),
    Leaves(0.75, 0.68, 0.3, 0.7),
    Leaves(0.5, 0.55, 0.38, 0.85),
    Leaves(0.24, 0.45, 0.26, 1.0),
    Leaves(0.74, 0.42, 0.26, 0.9),
    Leaves(0.48, 0.28, 0.3, 1.1),
    Leaves(0.4, 0.26, 0.15, 1.3),
)
