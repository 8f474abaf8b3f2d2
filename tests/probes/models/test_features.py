"""Similarity of patches and PCA colours, against numpy."""

import numpy as np
import pytest
import tiny_models
import torch

import probes

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize(("images", "width"), [(4, 40), (1, 2)])
def test_colours_are_the_main_components_of_all_images_together(images, width):
    torch.manual_seed(0)
    states = 3 + torch.logspace(1, 0, width) * torch.randn(images, 9, width)
    colours = probes.pca_colours({"a": states})["a"]
    assert colours.shape == (images, 3, 3, 3)
    assert torch.equal(colours, probes.pca_colours({"a": states.unflatten(1, (3, 3))})["a"])
    x = states.double().flatten(0, 1).numpy()
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    scores = (u * s)[:, :3]
    scores = scores * np.sign(scores[np.abs(scores).argmax(0), range(scores.shape[1])])
    expected = (scores - scores.min(0)) / np.ptp(scores, 0)
    colours = colours.view(-1, 3).numpy()
    np.testing.assert_allclose(colours[:, : expected.shape[1]], expected, atol=1e-6)
    assert (colours[:, expected.shape[1] :] == 0).all(), "fewer directions than colours"


def test_equal_states_have_no_colour():
    assert not probes.pca_colours({"a": torch.ones(1, 9, 6)})["a"].any()


def test_similarity_is_the_cosine_with_a_patch_of_the_first_image(checkpoints):
    mllm = probes.load(checkpoints["causal"])
    states = mllm.states(tiny_models.pixels(2))
    similarity = mllm.similarity(states, (1, 0))
    assert list(similarity) == mllm.sites
    for site, of_site in similarity.items():
        x = states[site][0].numpy()
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        expected = (unit @ unit[2]).reshape(2, 2)
        np.testing.assert_allclose(of_site.numpy(), expected, atol=1e-6)
