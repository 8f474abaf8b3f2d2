"""The scores of encoder, adapter and best layer, as the paper's Table 2 has them."""

from typing import Any

from probes.models.sites import ADAPTER, ENCODER, FINAL_NORM, is_layer


def peak_layer(scores: dict[str, float], sign: int = 1) -> str | None:
    """Return the decoder layer with the best score, without `final_norm` (the last layer, normalised).

    Args:
        scores: The main score by site.
        sign: 1 if a higher score is better, else -1.
    """
    layers = [site for site in scores if is_layer(site)]
    return max(layers, key=lambda site: sign * scores[site], default=None)


def summary(scores: dict[str, float], sign: int = 1) -> dict[str, Any]:
    """Return the score of encoder, adapter and best layer with their differences (Table 2); None if not probed.

    Differences are positive where the layer is better. `final_norm` is reported beside the best layer: the paper does
    not say whether its last layer is normalised.

    Args:
        scores: The main score by site.
        sign: 1 if a higher score is better, else -1.
    """
    peak = peak_layer(scores, sign)
    encoder = scores.get(ENCODER)
    adapter = scores.get(ADAPTER)
    best = scores.get(peak)

    def better_than(other):
        return None if best is None or other is None else sign * (best - other)

    return {
        "encoder": encoder,
        "adapter": adapter,
        "peak_llm": best,
        "peak_site": peak,
        "final_norm": scores.get(FINAL_NORM),
        "delta_enc": better_than(encoder),
        "recovery": better_than(adapter),
    }
