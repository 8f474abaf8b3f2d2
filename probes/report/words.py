"""Numbers, names and sentences of the report, the same on the page and in the terminal.

Scores are in per cent, differences in points with their sign; intervals have none before positive ends, which the value
has: +11.5 [9.4, 13.6].
"""

import re

MINUS = "\u2212"
SIGNS = {
    "causal": "◣",
    "bidirectional": "■",
}  # the matrix of a mask, as a character
SHORT_SITES = {
    "encoder": "out",
    "final_norm": "norm",
    "encoder_norm": "norm",
    "layer_00": "0",
    "encoder_00": "0",
}
THE_SITES = {
    "final_norm": "the final norm",
    "encoder_norm": "the final norm",
    "adapter": "the adapter",
    "encoder": "the encoder",
    "layer_00": "the patch embeddings",
    "encoder_00": "the patch embeddings",
}


# ------------------------------------------------------------------------------------------------ numbers
def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in per cent, without the sign %."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}"


def signed(value: float | None, points: bool = True) -> str:
    """Return a difference of fractions in points, +13.0, −1.2, 0.0; or as it is, in the unit of another task."""
    if value is None or value != value:
        return "–"
    text = f"{100 * value:+.1f}" if points else f"{value:+.3g}"
    return _minus(text)


def axis_number(value: float, signed: bool) -> str:
    """Return a round value at an axis; differences have a sign."""
    return _minus(f"{value:+g}" if signed else f"{value:g}")


def _minus(text: str) -> str:
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)


def interval(low: float | None, high: float | None, points: bool = True) -> str:
    """Return the interval of a difference: [−0.5, 24.0]; "" without one."""
    if low is None or high is None or low != low:
        return ""
    return f"[{signed(low, points).lstrip('+')}, {signed(high, points).lstrip('+')}]"


def plain(value: float) -> str:
    """Return a difference without its sign, for sentences that say which way it goes."""
    return percent(abs(value))


def p_value(value: float) -> str:
    """Return a p-value: 0.012, or < 0.001."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# ------------------------------------------------------------------------------------------------ sites
def site_number(site: str) -> int | None:
    """Return the number of a layer, None of another site."""
    number = site.rpartition("_")[2]
    return int(number) if number.isdecimal() else None


def site_name(site: str) -> str:
    """Return the name of a site in a sentence: layer 4, encoder layer 8, adapter."""
    if site in ("layer_00", "encoder_00"):
        return "patch embeddings"
    number = site_number(site)
    if number is None:
        return site.replace("_", " ")
    kind = site.rpartition("_")[0]
    return f"{'encoder layer' if kind == 'encoder' else kind} {number}"


def site_tick(site: str) -> str:
    """Return what stands at the axis for a site, below which its zone is named."""
    number = site_number(site)
    return SHORT_SITES.get(site) or (site if number is None else str(number))


def tile_name(site: str) -> str:
    """Return the name of a site below a small picture."""
    name = site_name(site).replace("encoder layer", "encoder")
    return "patches" if name == "patch embeddings" else name


def the_site(site: str) -> str:
    """Return the name of a site after "at" in a sentence: the adapter, layer 4."""
    return THE_SITES.get(site) or site_name(site)


def zone_of(site: str, has_llm: bool) -> str:
    """Return the part of the model that a site is in."""
    if site == "adapter":
        return "adapter"
    if site.startswith("encoder"):
        return "encoder"
    return "LLM layers" if has_llm else "encoder layers"


def lower_first(text: str) -> str:
    """Return a title within a sentence."""
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def key_parts(text: str) -> list[str]:
    """Return a sentence in pieces, keys of models ("{A}") by themselves, without braces."""
    return re.split(r"{(\w+)}", text)
