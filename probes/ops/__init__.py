"""Geometry, upsampling and loss on token grids: numerics without a model."""
