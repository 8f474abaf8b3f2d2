"""Frozen MLLMs: families, attention masks, knockout and hidden states of image tokens."""
