"""Check of what is read from a model, the same at every place that reads states or logits.

Checkpoints are released in float16, whose largest number is 65,504. Some layers of an LLM exceed it: states are then
infinite, later ones NaN, and the class or token with the largest logit is the first one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import UserError

DTYPE_ADVICE = (
    "numbers above 65,504 overflow float16: use bfloat16 or float32 (`--model.dtype`, of `llava-bidir generate` "
    "`--dtype`, in Python `dtype`)"
)


def check_outputs(kind: str, outputs: Mapping[str, Tensor]) -> None:
    """Raise if what is read from a model is NaN or infinite. The host waits for the device once.

    Args:
        kind: "states" or "logits", for the error.
        outputs: Floats of any shape by site, in forward order, on one device.

    Raises:
        UserError: Names the first site with such a value, and the dtypes to use.
    """
    with_values = {site: output.detach() for site, output in outputs.items() if output.numel()}
    if not with_values:
        return
    # a tenth of the time of isfinite, and without a copy; NaN is the extreme of whatever holds it
    finite = [torch.stack(output.aminmax()).isfinite().all() for output in with_values.values()]
    finite = torch.stack(finite).tolist()
    for site, is_finite in zip(with_values, finite, strict=True):
        if not is_finite:
            raise UserError(f"the {kind} at {site} are NaN or infinite; {DTYPE_ADVICE}")
