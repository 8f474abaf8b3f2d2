"""Fixtures of the tests of models; families have others of their own."""

import pytest
import tiny_models

import probes


# under the last mask, the prefix sees the image, also what a knockout blocks
@pytest.fixture(scope="module", params=["causal", "bidirectional", "prefix"])
def mllm(request, checkpoints):
    return probes.load(str(checkpoints[request.param]))


@pytest.fixture(scope="module")
def pixels():
    return tiny_models.pixels(3)
