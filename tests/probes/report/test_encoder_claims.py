"""Claims about the layers of a bare encoder, from runs of random counts."""

import pytest
from report_parts import claims_of

from probes.runs.read import ProbeRun

SITES = ["layer_00", "layer_01", "layer_02", "layer_03", "final_norm"]
PEAK = [0.2, 0.5, 0.8, 0.6, 0.7]  # layer 2 is far above the others, also on a tenth of the images
RISE = [0.2, 0.4, 0.6, 0.8, 0.8]
FLAT = [0.2, 0.2, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    ("trained", "random", "gain", "over_last"),
    [
        (PEAK, FLAT, "supported", "supported"),
        (RISE, FLAT, "supported", "does not hold"),
        (PEAK, PEAK, "not learned", "also in random layers"),
    ],
)
def test_gains_are_over_the_patch_embeddings_and_the_last_layer(
    trained, random, gain, over_last, write, draws
):
    """The norm after the last layer is no layer; nobody learns a last layer that reads worse."""
    kind = {"options": {"sites": SITES}, "mask": "bidirectional", "model_kind": "encoder"}
    runs = [write("trained", trained, 1, solved=True, **kind)]
    runs += draws(random, random, untrained=["encoder"], **kind)
    miou = {entry["site"]: entry["miou"] for entry in ProbeRun(runs[0]).metrics["sites"]}
    best = max(SITES[:-1], key=miou.get)
    claims = claims_of(runs)
    assert claims.keys() == {"layer_gain", "over_last"}
    assert claims["layer_gain"]["value"] == pytest.approx(miou[best] - miou["layer_00"])
    assert claims["over_last"]["value"] == pytest.approx(miou[best] - miou["layer_03"])
    assert claims["layer_gain"]["conclusion"] == gain
    assert claims["over_last"]["conclusion"] == over_last
    assert claims["over_last"]["supported"] is (over_last == "supported")


@pytest.mark.parametrize("kind", ["encoder", "mllm"])
def test_a_last_layer_that_was_probed_without_the_patches_is_compared(write, kind):
    """The page said that it was not probed, beside its score. No last layer of an LLM is compared."""
    options = {"sites": SITES[2:]}
    run = write("trained", PEAK[2:], solved=True, options=options, model_kind=kind)
    claims = claims_of([run])
    sites = ProbeRun(run).metrics["sites"]
    assert list(claims) == ["over_last"] * (kind == "encoder")
    if claims:
        difference = sites[0]["miou"] - sites[1]["miou"]
        assert claims["over_last"]["value"] == pytest.approx(difference)
