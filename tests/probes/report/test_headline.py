"""The first sentences of a report, from the best site and the findings about it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from report_parts import reading

from probes.report.hero import about_one, plain_text
from probes.report.readings import Name

MLLM = {"encoder": 0.5, "adapter": 0.31, "layer_01": 0.4, "layer_02": 0.444}
ENCODER = {"layer_00": 0.14, "layer_01": 0.4, "layer_02": 0.62, "layer_03": 0.6}
HOLDS, FAILS = "holds", "does not hold"


def claim(finding: str, value: float, optimum: str, random: float = 0.008) -> SimpleNamespace:
    return SimpleNamespace(finding=finding, value=value, optimum_verdict=optimum, random=random)


def said(scores: dict[str, float], claims: dict) -> str:
    lead = reading(scores, "adapter" in scores)
    return plain_text(about_one(lead, claims), {"A:causal": Name("", "tiny")})


@pytest.mark.parametrize(
    ("scores", "claims", "text"),
    [
        (
            MLLM,
            {"recovery": claim("undecided", 0.13, HOLDS)},
            "tiny segments best at its encoder: 50.0% mIoU. Its LLM adds 13.0 points to its adapter, but this is not "
            "shown to be learned.",
        ),
        (
            MLLM,
            {"recovery": claim("not learned", 0.13, HOLDS)},
            "tiny segments best at its encoder: 50.0% mIoU. Its LLM adds 13.0 points to its adapter, as random LLMs "
            "do.",
        ),
        (
            MLLM,
            {"recovery": claim("reversed", -0.031, "reversed")},
            "tiny segments best at its encoder: 50.0% mIoU. Its LLM layers read 3.1 points less than its adapter.",
        ),
        (
            MLLM,
            {"recovery": claim("no effect", 0.001, FAILS)},
            "tiny segments best at its encoder: 50.0% mIoU. No LLM layer improves on its adapter (31.0%).",
        ),
        (
            MLLM,
            {
                "recovery": claim("undecided", 0.0, FAILS),
                "adapter_drop": claim("not learned", 0.123, HOLDS),
            },
            "tiny segments best at its encoder: 50.0% mIoU. Its adapter loses 12.3 points, as random adapters do, and "
            "no LLM layer is shown to recover them.",
        ),
        (
            MLLM,
            {"recovery": claim("undecided", 0.0, FAILS)},
            "tiny segments best at its encoder: 50.0% mIoU. No LLM layer is shown to improve on its adapter (31.0%).",
        ),
        (
            ENCODER,
            {
                "over_last": claim("undecided", 0.002, FAILS),
                "layer_gain": claim("supported", value=0.467, optimum=HOLDS, random=0.073),
            },
            "tiny segments best at layer 2 of 3: 62.0% mIoU. Its layers add 46.7 points to its patches, random layers "
            "7.3. The last layer is not shown to read less.",
        ),
        (
            ENCODER,
            {
                "over_last": claim("not learned", 0.02, HOLDS),
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


def test_without_random_models_nothing_is_said_of_training():
    lead = replace(reading(ENCODER, has_llm=False), draws={})
    text = plain_text(about_one(lead, {}), {"A:causal": Name("A", "tiny")})
    assert text == (
        "A tiny segments best at layer 2: 62.0% mIoU. No random models were solved: whether training put it there is "
        "not known."
    )


def test_nothing_is_said_of_the_last_layer_where_it_is_the_best():
    scores = ENCODER | {"layer_03": 0.7}
    text = said(scores, {"over_last": claim("no effect", 0.0, FAILS)})
    assert text == "tiny segments best at its last layer: 70.0% mIoU."
