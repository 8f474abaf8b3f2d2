#!/usr/bin/env bash
# torchmetrics' segmentation.MeanIoU is not the mIoU of ADE20K and VOC: a stray pixel can cost a class as much as an object.
#
# Guess: MeanIoU is mIoU as papers report it, of intersections and unions that are summed over all images, and equals
# MulticlassJaccardIndex with average="macro".
# Found (torchmetrics 1.9.0): it takes the IoU of each image, and a class's is the mean over the images where the class is
# in the mask or predicted. An image without the class in which one pixel is taken for it counts as 0. Here a class has
# one object of 100 pixels, all right, and one stray pixel in each of 19 other images: its IoU is 0.84 by sums, and 0.05
# here; mIoU of three classes is 0.95 and 0.68. Neither the name nor the description says which mean it is.
# Who meets it: whoever compares a number of this class with one of a paper, or ranks probes by it: rare classes decide.
# This project sums, as the benchmarks do.
#
# Needs Python >= 3.10 and a network; works in a temporary folder. Fails if the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 numpy==2.3.5 torchmetrics==1.9.0

cat >mean_iou.py <<'PY'
import torch
import torchmetrics
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

masks = torch.zeros(20, 64, 64, dtype=torch.long)  # class 0 above, class 1 below
masks[:, 32:] = 1
predicted = masks.clone()
masks[0, :10, :10] = predicted[0, :10, :10] = 2  # the object, all right
predicted[1:, 0, 0] = 2  # a stray pixel in each other image

metrics = {
    "MulticlassJaccardIndex": MulticlassJaccardIndex(3, average="none"),
    "MeanIoU": MeanIoU(3, input_format="index", per_class=True),
}
iou = {}
print(f"torchmetrics {torchmetrics.__version__}, IoU of classes, and their mean:")
for name, metric in metrics.items():
    for first in range(0, len(masks), 8):
        metric.update(predicted[first : first + 8], masks[first : first + 8])
    iou[name] = metric.compute()
    print(f"  {name:<24}", [round(x, 3) for x in iou[name].tolist()], round(iou[name].mean().item(), 3))

both = ((predicted == 2) & (masks == 2)).sum((1, 2))
either = ((predicted == 2) | (masks == 2)).sum((1, 2))
by_sums = both.sum() / either.sum()
by_image = (both / either).mean()
print(f"  class 2 by hand: {by_sums:.3f} of sums, {by_image:.3f} as a mean over images")
assert torch.isclose(iou["MulticlassJaccardIndex"][2], by_sums)
assert torch.isclose(iou["MeanIoU"][2], by_image), "the behaviour has changed"
PY
env/bin/python mean_iou.py
