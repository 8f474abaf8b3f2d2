"""Names of the sites where states are read; imports nothing, since reports need them without a model."""

ENCODER = "encoder"
ADAPTER = "adapter"
FINAL_NORM = "final_norm"
PATCHES = "layer_00"  # of a bare encoder: patch embeddings, the input of its first layer
ALL = "all"  # stands for every site, also for the encoder's own layers in an MLLM


def layer_site(layer: int) -> str:
    """Return the site name of decoder layer 1..L, e.g. "layer_07"."""
    return f"layer_{layer:02d}"


def encoder_site(layer: int) -> str:
    """Return the site name of layer 0..L of the encoder in an MLLM, e.g. "encoder_07"."""
    return f"{ENCODER}_{layer:02d}"


def is_layer(site: str) -> bool:
    """Return whether a site is a layer of the LLM or, of a bare encoder, one of its layers."""
    return site.startswith("layer_")


def last_layer(sites: list[str]) -> str | None:
    """Return the last layer among sites in forward order; None if there is none."""
    return next((site for site in reversed(sites) if is_layer(site)), None)


def is_encoder_layer(site: str) -> bool:
    """Return whether a site is one of the encoder's own layers in an MLLM; of a bare encoder none is."""
    return site.startswith(f"{ENCODER}_")


def is_before_adapter(site: str) -> bool:
    """Return whether a site of an MLLM is in its encoder, or is the encoder's output."""
    return site == ENCODER or is_encoder_layer(site)


def wants_all(sites: str | list[str] | None) -> bool:
    """Return whether chosen sites are "all", by itself or as a list."""
    return sites in (ALL, [ALL])


def site_names(layers: int) -> list[str]:
    """Return all sites of a model with `layers` decoder layers, in forward order."""
    return [ENCODER, ADAPTER, *(layer_site(i) for i in range(1, layers + 1)), FINAL_NORM]
