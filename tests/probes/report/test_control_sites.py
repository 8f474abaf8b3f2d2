"""Random models with probes at some layers: what is judged beyond them is of these layers of the trained model, too."""

import pytest
from report_parts import claims_of

from llava_bidir.common.errors import UserError
from probes.models.sites import every_nth, site_names

LAYERS = 6
PEAK = [0.5, 0.45, *[0.45] * 3, 0.8, 0.45, 0.45, 0.45]  # at layer 4, between those of the controls
LAST = [0.5, 0.45, *[0.45] * 5, 0.8, 0.45]


@pytest.fixture
def runs(write, draws):
    """Return a function that writes a trained run, and random ones with probes at some of its sites."""

    def runs(trained: list[float], kept: list[str]) -> list[str]:
        names = site_names(LAYERS)
        flat = [0.45 for _ in kept]
        options = {"sites": kept}
        last = {"last_layer": names[-2]}
        controls = draws(flat, flat, options=options, step=1, **last)
        return [write("solved", trained, 1, solved=True), *controls]

    return runs


@pytest.mark.parametrize(("trained", "conclusion"), [(PEAK, "not learned"), (LAST, "supported")])
def test_both_maxima_are_over_the_layers_that_both_have(trained, conclusion, runs):
    """A peak where random models have no probes is no evidence: they may have it, too."""
    kept = every_nth(site_names(LAYERS)[1:], 3)
    claim = claims_of(runs(trained, kept))["recovery"]
    optimum, beyond = (claim["verdicts"][name] for name in ("optimum", "beyond_random"))
    assert optimum["value"] > 0.2, "of all layers"
    assert claim["conclusion"] == conclusion
    assert beyond["layers"] == ["adapter", "layer_03", "layer_06"]


def test_layers_that_are_not_spaced_by_depth_are_refused(runs):
    with pytest.raises(UserError, match="differ in layers"):
        claims_of(runs(LAST, ["adapter", "layer_01", "layer_02", "layer_06"]))


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_first_last_and_every_nth_layer_stay_with_their_parts(step):
    sites = ["adapter", "attn_01", "layer_01", "attn_02", "layer_02", "layer_03", "final_norm"]
    layers = [i for i in range(4) if i % step == 0 or i == 3]
    expected = [site for site in sites if site[-1].isdigit() and int(site[-2:]) in layers]
    assert every_nth(sites, step) == ["adapter", *expected, "final_norm"]
