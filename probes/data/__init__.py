"""Segmentation datasets: images and masks in, batches out."""
