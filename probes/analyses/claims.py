"""The claims that a report judges: of the scores by layer, of the analyses, and of analyses outside this repository."""

from collections.abc import Mapping

from llava_bidir.common.errors import UserError

from . import ANALYSES
from .base import Claim

CLAIMS: dict[str, Claim] = {
    "adapter_drop": Claim(
        +1,
        "Segmentation drops at the adapter: encoder mIoU minus adapter mIoU (Sec. 3.1)",
        "adapter drop",
    ),
    "recovery": Claim(
        +1,
        "LLM layers recover it after the adapter: best layer's mIoU minus the adapter's (Sec. 3.2)",
        "recovery",
    ),
    "recovery_trained": Claim(
        +1,
        "The recovery comes from training: recovery minus that of the untrained model",
        "recovery from training",
    ),
    "layer_gain": Claim(
        +1,
        "The encoder's layers make patches readable: best layer's mIoU minus that of the patch embeddings",
        "best layer − patch embeddings",
    ),
    "over_last": Claim(
        +1,
        "A layer reads better than the last one: best layer's mIoU minus the last layer's",
        "best layer − last layer",
        unlearned="also in random layers",  # true of where to read, whatever made it so
    ),
    **{name: claim for analysis in ANALYSES.values() for name, claim in analysis.claims.items()},
}
ANALYSIS_OF: dict[str, str] = {  # of each claim of an analysis
    claim: name for name, analysis in ANALYSES.items() for claim in analysis.claims
}


def register_analysis(name: str, claims: Mapping[str, Claim]) -> None:
    """Add the claims of an analysis outside this repository, so that reports of this process judge them.

    The analysis writes the effect of each claim into the folder of each run (:func:`probes.write_effects`). A report
    then has the three columns of the claim: from trained probes, from solved ones, and beyond random models.
    tests/extending/outside_analysis.py is one.

    Args:
        name: Name of the analysis, an identifier.
        claims: By name.

    Raises:
        UserError: The name is no identifier, or an analysis or claim of that name exists already.
    """
    if not name.isidentifier():
        raise UserError(f"analysis {name!r}: expected a name of letters, digits and _")
    if name in ANALYSES or name in ANALYSIS_OF.values():
        raise UserError(f"analysis {name!r} is registered already; choose another name")
    for claim in claims:
        if claim in CLAIMS:
            raise UserError(f"claim {claim!r} of {name} exists already; choose another name")
    for claim, description in claims.items():
        CLAIMS[claim] = description
        ANALYSIS_OF[claim] = name
