"""Distance to the nearest boundary, by least squares: `--data.task distance --import task.py`."""

import numpy as np
from scipy.ndimage import distance_transform_edt

import probes


class Distance(probes.Task):
    name = "distance"
    targets = "boundaries"
    labels = {"mae": "mean absolute error (px)"}

    def read(self, target):
        distance = distance_transform_edt(target != 1).astype(np.float32)
        return np.where(target == 255, np.float32(np.nan), distance)

    def values(self, target):
        return target.log1p()[..., None]

    def predict(self, maps):
        return maps.squeeze(-3).clamp(0, 10).expm1()


probes.register_task(Distance())
