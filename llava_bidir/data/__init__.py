"""LLaVA JSON and images to training batches."""
