"""Claims about the layers of a bare encoder, from runs of random counts."""

from itertools import product

import pytest
from report_parts import claims_of

from probes.runs.read import ProbeRun

SITES = ["layer_00", "layer_01", "layer_02", "layer_03", "final_norm"]
PEAK = [0.2, 0.5, 0.8, 0.6, 0.7]  # layer 2 is far above the others, also on a tenth of the images
RISE = [0.2, 0.4, 0.6, 0.8, 0.8]
FLAT = [0.2, 0.2, 0.2, 0.2, 0.2]


@pytest.fixture
def claims_and_scores(write):
    """Return a function that returns the claims of an encoder and of two random ones, by name, and mIoU by site."""

    def claims_and_scores(trained, random) -> tuple[dict, dict]:
        kind = {
            "sites": SITES,
            "solved": True,
            "mask": "bidirectional",
            "model_kind": "encoder",
        }
        runs = [write("trained", trained, 1, **kind)]
        for match, i in product(("update", "permuted"), (0, 1)):
            weights = {
                "untrained": ["encoder"],
                "match": match,
                "draw": i,
            }
            runs.append(
                write(
                    f"{match}{i}",
                    random,
                    10 + i,
                    **weights,
                    **kind,
                )
            )
        miou = {entry["site"]: entry["miou"] for entry in ProbeRun(runs[0]).metrics["sites"]}
        return claims_of(runs), miou

    return claims_and_scores


def test_gains_are_over_the_patch_embeddings_and_the_last_layer(claims_and_scores):
    """The norm after the last layer is no layer."""
    claims, miou = claims_and_scores(PEAK, FLAT)
    assert claims.keys() == {"layer_gain", "over_last"}
    assert claims["layer_gain"]["value"] == pytest.approx(miou["layer_02"] - miou["layer_00"])
    assert claims["over_last"]["value"] == pytest.approx(miou["layer_02"] - miou["layer_03"])
    assert claims["over_last"]["conclusion"] == claims["layer_gain"]["conclusion"] == "supported"


@pytest.mark.parametrize("kind", ["encoder", "mllm"])
def test_a_last_layer_that_was_probed_without_the_patches_is_compared(write, kind):
    """The page said that it was not probed, beside its score. No last layer of an LLM is compared."""
    run = write(
        "trained",
        PEAK[2:],
        solved=True,
        sites=SITES[2:],
        model_kind=kind,
    )
    claims = claims_of([run])
    sites = ProbeRun(run).metrics["sites"]
    assert list(claims) == ["over_last"] * (kind == "encoder")
    if claims:
        difference = sites[0]["miou"] - sites[1]["miou"]
        assert claims["over_last"]["value"] == pytest.approx(difference)


def test_where_the_last_layer_is_the_best_none_reads_better(claims_and_scores):
    claims, _ = claims_and_scores(RISE, FLAT)
    assert claims["over_last"]["value"] == 0
    assert claims["over_last"]["conclusion"] == "does not hold"
    assert claims["layer_gain"]["conclusion"] == "supported"


def test_a_best_layer_that_random_ones_have_too_is_not_called_unlearned(claims_and_scores):
    """Nobody learns a last layer that reads worse; it is where to read, in random layers as well."""
    claims, _ = claims_and_scores(PEAK, PEAK)
    assert claims["over_last"]["conclusion"] == "also in random layers"
    assert claims["over_last"]["supported"] is False
    assert claims["layer_gain"]["conclusion"] == "not learned"
