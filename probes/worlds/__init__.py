"""The toy world of `make demo`: synthetic scenes, conversations about them, a tiny encoder and a tiny LLM."""
