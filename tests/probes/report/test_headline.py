"""The first sentences of a report, from the best site and the findings about it."""

from types import SimpleNamespace

import pandas as pd
import pytest

from probes.report.compare import BEST_LAYER
from probes.report.hero import headline, plain_text
from probes.report.readings import SiteReading

MLLM = {"encoder": 0.5, "adapter": 0.31, "layer_01": 0.4, "layer_02": 0.444}
ENCODER = {"layer_00": 0.14, "layer_01": 0.4, "layer_02": 0.62, "layer_03": 0.6}
NONE = pd.DataFrame(columns=["of", "low", "high", "difference", "site", "first", "second"])
HOLDS, FAILS = "holds", "does not hold"


def reading(scores: dict[str, float], has_llm: bool) -> SiteReading:
    """A model A of these scores."""
    model = SimpleNamespace(key="A", has_llm=has_llm, depth=len(scores) - (2 if has_llm else 1))
    rows = [
        SimpleNamespace(site=site, value=value, value_text=f"{100 * value:.1f}")
        for site, value in scores.items()
    ]
    own = {site: site for site in scores}
    return SiteReading(
        model=model,
        mask="causal",
        data="toy",
        task="segmentation",
        seed=0,
        rows=rows,
        draws={},
        own=own,
        pictures={},
    )


def claim(finding: str, value: float, optimum: str, random: float = 0.008) -> SimpleNamespace:
    return SimpleNamespace(finding=finding, value=value, optimum_verdict=optimum, random=random)


def said(scores: dict[str, float], claims: dict, differences: pd.DataFrame = NONE) -> str:
    sentences = headline(reading(scores, "adapter" in scores), claims, differences)
    labels = {"A": "tiny"} | ({"D": "shuffled"} if len(differences) else {})
    return plain_text(sentences, labels)


@pytest.mark.parametrize(
    ("scores", "claims", "text"),
    [
        (
            MLLM,
            {"recovery": claim("not learned", 0.13, HOLDS)},
            "tiny segments best at its encoder: 50.0% mIoU. Its LLM adds 13.0 points to its adapter, but this is not "
            "shown to be learned.",
        ),
        (
            MLLM,
            {
                "recovery": claim(FAILS, 0.0, FAILS),
                "adapter_drop": claim("not learned", 0.123, HOLDS),
            },
            "tiny segments best at its encoder: 50.0% mIoU. Its adapter loses 12.3 points, as random adapters do, and "
            "no LLM layer is shown to recover them.",
        ),
        (
            MLLM,
            {"recovery": claim(FAILS, 0.0, FAILS)},
            "tiny segments best at its encoder: 50.0% mIoU. No LLM layer is shown to improve on its adapter (31.0%).",
        ),
        (
            ENCODER,
            {
                "over_last": claim(FAILS, 0.002, FAILS),
                "layer_gain": claim("supported", value=0.467, optimum=HOLDS, random=0.073),
            },
            "tiny segments best at layer 2 of 3: 62.0% mIoU. Its layers add 46.7 points to its patches, random layers "
            "7.3. The last layer is not shown to read less.",
        ),
        (
            ENCODER,
            {
                "over_last": claim("also in random layers", 0.02, HOLDS),
                "layer_gain": claim("not learned", 0.4, HOLDS),
            },
            "Read tiny at layer 2 of 3: 62.0% mIoU. It reads 2.0 points more than the last layer. Random layers have "
            "such a gap, too.",
        ),
    ],
)
def test_the_best_site_and_what_is_shown_of_it(scores, claims, text):
    """Golden files have what is said of an LLM that adds something, and of one that was not tested."""
    assert said(scores, claims) == text


def test_the_first_model_that_differs_is_named():
    row = [BEST_LAYER, -0.16, -0.09, -0.127, "encoder", "A", "D"]
    text = said(MLLM, {}, pd.DataFrame([row], columns=NONE.columns))
    assert text == (
        "A tiny segments best at its encoder: 50.0% mIoU. D shuffled reads 12.7 points less."
    )
