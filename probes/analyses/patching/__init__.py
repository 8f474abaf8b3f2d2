"""Activation patching: states of one forward replaced by those of another, layer by layer."""
