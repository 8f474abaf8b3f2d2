"""Tiny models that tests of models share, each loaded once."""

from functools import cache

import pytest
import tiny_families
import torch
from PIL import Image

import probes


# under the last mask, the prefix sees the image, also what a knockout blocks
@pytest.fixture(scope="module", params=["causal", "bidirectional", "prefix"])
def mllm(request, checkpoints):
    return probes.load(checkpoints[request.param])


@pytest.fixture(scope="session")
def pictures():
    generator = torch.Generator().manual_seed(0)
    arrays = torch.randint(0, 255, (5, 20, 30, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(array) for array in arrays]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a function that writes the checkpoint of a family; modules that call it use `small_squares`."""
    return cache(lambda name: str(tiny_families.write(name, tmp_path_factory.mktemp(name))))


@pytest.fixture(scope="session")
def load_family(checkpoint):
    return cache(lambda name: probes.load(checkpoint(name), device="cpu"))
