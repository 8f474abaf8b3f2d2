"""Exact depth, surface normals and instances of a scene, from the planes on which it is drawn.

In perspective, the height in pixels of a person who stands at the depth of a plane is linear in the pixel coordinates.
A `Plane` is this linear function, so that it determines depth and normal without further parameters. Metres follow from
two conventions: adults are `ADULT_M` tall, and the focal length is `FOCAL_PX`. Then rooms are 7 to 14 m deep.

Outlines are rounded to thirds of a pixel: a plane that is seen edge-on may reach beyond its ends, and a few pixels
between walls and ground, below the horizon, may show the background, which has no depth there.

Axes of normals: x to the right, y down, z towards the viewer. Shapes: H = W = SIZE_PX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# the side of the picture: a field of view of 53 degrees, about that of a 35 mm lens on its long side
FOCAL_PX = 96.0
ADULT_M = 1.7


class Plane(NamedTuple):
    """A plane in space, by the height a x + b y + c in pixels of an adult at the depth of its point in pixel (x, y)."""

    a: float
    b: float
    c: float

    @classmethod
    def facing(cls, adult_px: float) -> Plane:
        """Return the plane parallel to the picture where adults are that tall."""
        return cls(0, 0, adult_px)


NOWHERE = Plane(np.nan, np.nan, np.nan)  # of what has no depth: the sky


@dataclass(frozen=True)
class Surfaces:
    """What each pixel of a scene shows.

    Args:
        index: uint8[H, W], the surface of each pixel.
        planes: f64[S, 3], the plane of each surface.
        objects: uint8[S], the number of the object that each surface belongs to.
        eye: The vanishing point in pixels, through which the viewing direction passes.
    """

    index: np.ndarray
    planes: np.ndarray
    objects: np.ndarray
    eye: tuple[float, float]

    def depth(self) -> np.ndarray:
        """Return the depth along the viewing direction in metres, float32[H, W], NaN where there is none."""
        rows, columns = np.indices(self.index.shape) + 0.5  # pixel centres
        a, b, c = self.planes[self.index].transpose(2, 0, 1)
        adult_px = a * columns + b * rows + c
        return np.where(adult_px > 0, FOCAL_PX * ADULT_M / adult_px, np.nan).astype(np.float32)

    def normals(self) -> np.ndarray:
        """Return the unit normals that face the viewer, float32[H, W, 3], NaN where there is none."""
        a, b, c = self.planes.T
        vectors = np.stack(
            [-FOCAL_PX * a, -FOCAL_PX * b, a * self.eye[0] + b * self.eye[1] + c], axis=1
        )
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.where(
            np.isnan(self.depth())[..., None], np.nan, vectors.astype(np.float32)[self.index]
        )

    def instance_ids(self) -> np.ndarray:
        """Return the object that each pixel shows, uint8[H, W]; 0 is the sky or the ceiling."""
        return self.objects[self.index]
