"""Files of effects: "NAME" f64[1 + R], a number and its resamplings, for each effect of a run.

    RUN/effects.safetensors            of the run's own scores
    RUN/ANALYSIS_effects.safetensors   of an analysis of the run

    "recovery"                 with the chosen probes; a claim of this name reads it
    "recovery@weaker"          at a row of strengths (`strengths.ROWS`), which the column "optimum" reads
    "patch_0@layer_07"         at a site; a claim with `between_masks` is the difference of two runs there
    "knockout_correct@random"  against random tokens; a claim with `against_tokens` reads it at the optimum and
                               beyond random

The metadata "effects" are JSON: "about", by effect in the order of the run, and "run", the fingerprint of the probes
that an analysis was made from, else null. One entry, since safetensors writes several in any order.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_bidir.common.errors import UserError

from .estimate import Estimate

EFFECTS_FILE = "effects.safetensors"


def effect_file(
    effects: Mapping[str, Estimate], run: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a file of effects; `run` is the fingerprint of the probes of an analysis."""
    tensors = {name: estimate.vector for name, estimate in effects.items()}
    about = {name: estimate.about for name, estimate in effects.items()}
    return tensors, {"effects": json.dumps({"run": run, "about": about})}


def read_effect_file(path: Path) -> tuple[dict[str, Estimate], str | None]:
    """Return the effects of a file, and the fingerprint of the probes of an analysis.

    Raises:
        UserError: The file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {})["effects"])
            effects = {
                name: Estimate.from_vector(file.get_tensor(name), entry)
                for name, entry in metadata["about"].items()
            }
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again") from None
    return effects, metadata["run"]
