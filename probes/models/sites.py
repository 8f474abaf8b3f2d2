"""Names of the sites where states are read; imports nothing, since reports need them without a model."""

ENCODER = "encoder"
ADAPTER = "adapter"
FINAL_NORM = "final_norm"
PATCHES = "layer_00"  # of a bare encoder: patch embeddings, the input of its first layer


def layer_site(layer: int) -> str:
    """Return the site name of decoder layer 1..L, e.g. "layer_07"."""
    return f"layer_{layer:02d}"


def site_names(layers: int) -> list[str]:
    """Return all sites of a model with `layers` decoder layers, in forward order."""
    return [ENCODER, ADAPTER, *(layer_site(i) for i in range(1, layers + 1)), FINAL_NORM]
