"""The sentence about claims whose truth is known: it counts verdicts that are right, and names those that are not."""

import pytest

from probes.report.claim_table import summarize_truths

EMPTY = {"value": None, "ci95": None, "verdict": "untested"}


def claim(name: str, truth: str | None, finding: str, mask: str = "causal") -> dict:
    """A claim with this finding; a supported one is supported in all columns."""
    return {
        "claim": name,
        "image_attention": mask,
        "text": f"{name}: a number",
        "verdicts": {column: EMPTY for column in ("paper", "optimum", "beyond_random")},
        "value": 0.1,
        "ci95": [0.0, 0.2],
        "n": {"images": 40},
        "p_holm": None,
        "conclusion": "supported" if finding.startswith("supported") else finding,
        "finding": finding,
    } | ({"truth": truth} if truth else {})


def study(*claims: dict, model: str = "as trained", masks=("causal",)) -> dict:
    return {"model": model, "masks": dict.fromkeys(masks), "claims": [*claims]}


BOTH = ("causal", "bidirectional")


@pytest.mark.parametrize(
    ("studies", "sentence"),
    [
        ([study(claim("recovery", None, "supported"))], ""),
        (
            [
                study(
                    claim("recovery", "planted", "supported"),
                    claim("recovery", "planted", "supported", "bidirectional"),
                    claim("starvation", "planted", "does not hold"),
                    masks=BOTH,
                ),
                study(claim("adapter_drop", "absent", "not learned"), model="intact"),
            ],
            "The verdicts are right about 3 of 4 claims whose truth is known: supported are 2 of 3 planted effects "
            "(missed: starvation under causal attention, of the model 'as trained') and 0 of 1 absent ones.",
        ),
        (
            [
                study(claim("recovery", "absent", "supported"), model="LLM shuffled"),
                study(claim("adapter_drop", "planted", "supported by itself"), model="merged"),
                study(claim("starvation", "planted", "untested")),
            ],
            "The verdicts are right about 0 of 2 claims whose truth is known: supported are 0 of 1 planted effects "
            "(missed: adapter drop, of the model 'merged') and 1 of 1 absent ones (wrongly: recovery, of the model "
            "'LLM shuffled'); 1 untested.",
        ),
        (
            [study(claim("recovery", "planted", "untested"))],
            "The verdicts are right about 0 of 0 claims whose truth is known; 1 untested.",
        ),
    ],
)
def test_the_sentence_says_whether_the_verdicts_are_right(studies, sentence):
    assert summarize_truths(studies) == sentence
