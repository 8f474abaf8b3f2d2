"""Names of the sites where states are read; imports nothing of ours, since reports need them without a model.

Sites of the main path follow each other from the pixels to the output: "encoder", "adapter", "layer_07". A part is
inside a layer: "attn_07".
"""

from collections.abc import Sequence

ENCODER = "encoder"
ADAPTER = "adapter"
FINAL_NORM = "final_norm"
PATCHES = "layer_00"  # of a bare encoder: patch embeddings, the input of its first layer
ALL = "all"  # stands for every site of the main path, also for the encoder's own layers in an MLLM
ALL_PARTS = "all_parts"  # stands for these and for the parts of every layer
VALUE = "value"
LAYER_PARTS = (VALUE, "attn", "mlp")  # in forward order


def layer_site(layer: int) -> str:
    """Return the site name of decoder layer 1..L, e.g. "layer_07"."""
    return f"layer_{layer:02d}"


def encoder_site(layer: int) -> str:
    """Return the site name of layer 0..L of the encoder in an MLLM, e.g. "encoder_07"."""
    return f"{ENCODER}_{layer:02d}"


def layer_number(site: str) -> int:
    """Return the number in the name of a layer or of a part of one."""
    return int(site.rpartition("_")[2])


def part_of(site: str) -> str | None:
    """Return which part of its layer a site is, one of `LAYER_PARTS`; None for a site of the main path."""
    part, _, number = site.rpartition("_")
    if part in LAYER_PARTS and number.isdecimal():
        return part
    return None


def is_on_main_path(site: str) -> bool:
    """Return whether a site is not inside a layer."""
    return part_of(site) is None


def is_layer(site: str) -> bool:
    """Return whether a site is a layer of the LLM or, of a bare encoder, one of its layers."""
    return site.startswith("layer_")


def last_layer(sites: list[str]) -> str | None:
    """Return the last layer among sites in forward order; None if there is none."""
    return next((site for site in reversed(sites) if is_layer(site)), None)


def layer_around(site: str) -> str:
    """Return the layer that a part is inside of; another site is returned as it is."""
    if part_of(site) is None:
        return site
    return layer_site(layer_number(site))


def every_nth(sites: Sequence[str], step: int) -> list[str]:
    """Return the first of sites in forward order, every `step`-th layer after it, and the last one with its norm.

    What is inside a layer stays with it.
    """
    layers = dict.fromkeys(layer_around(site) for site in sites if site != FINAL_NORM)
    spaced = [*layers][::step]
    ends = [*layers][-1:]
    return [site for site in sites if layer_around(site) in (*spaced, *ends, FINAL_NORM)]


def is_encoder_layer(site: str) -> bool:
    """Return whether a site is one of the encoder's own layers in an MLLM; of a bare encoder none is."""
    return site.startswith(f"{ENCODER}_")


def is_before_adapter(site: str) -> bool:
    """Return whether a site of an MLLM is in its encoder, or is the encoder's output."""
    return site == ENCODER or is_encoder_layer(site)


def is_in_llm_space(site: str) -> bool:
    """Return whether states at a site of an MLLM are vectors that its LLM's output head can read.

    What attention and MLP add to the residual stream is in its space. Values are not.
    """
    return not (is_before_adapter(site) or part_of(site) == VALUE)


def site_names(layers: int) -> list[str]:
    """Return the sites of the main path of a model with `layers` decoder layers, in forward order."""
    return [ENCODER, ADAPTER, *(layer_site(i) for i in range(1, layers + 1)), FINAL_NORM]


def part_names(layer: int) -> list[str]:
    """Return the sites inside layer 1..L, in forward order."""
    return [f"{part}_{layer:02d}" for part in LAYER_PARTS]


def with_parts(sites: list[str], parts: list[str]) -> list[str]:
    """Return sites of the main path and parts of their layers, in forward order: parts before their layer."""
    by_layer: dict[str, list[str]] = {}
    for part in parts:
        by_layer.setdefault(layer_around(part), []).append(part)
    ordered = []
    for site in sites:
        ordered += [*by_layer.get(site, []), site]
    return ordered
