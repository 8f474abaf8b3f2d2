"""Probes trained by Lightning, as the paper does."""
