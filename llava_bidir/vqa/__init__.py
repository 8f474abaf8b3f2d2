"""Table 1: language benchmarks with lmms-eval, which runs in its own environment (`make vqa-venv`)."""
