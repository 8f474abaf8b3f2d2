"""Statistics of states against numpy and scikit-learn, token by token."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from probes.evaluation.feature_statistics import StateStatistics

pytestmark = pytest.mark.numerics

WIDTHS = {"encoder": 6, "adapter": 9}
TOKENS = 20


def random_states(images: int = 5) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """States that lie around a common direction and one of their class; some tokens have no label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 3, (images, TOKENS), generator=generator)
    states = {
        site: 3.0 * torch.randn(images, TOKENS, width, generator=generator)
        + 2.0
        + 4.0 * torch.randn(4, width, generator=generator)[labels + 1]
        for site, width in WIDTHS.items()
    }
    return states, labels


def purity_of_image(states: np.ndarray, labels: np.ndarray, k: int = 10) -> float:
    states, labels = states[labels >= 0], labels[labels >= 0]
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(states)
    nearest = search.kneighbors(return_distance=False)  # of the fitted points, each without itself
    return (labels[nearest] == labels[:, None]).mean()


def fed(states, labels, batches) -> StateStatistics:
    statistics = StateStatistics(WIDTHS, len(labels))
    for batch in batches:
        statistics.update({site: x[batch] for site, x in states.items()}, labels[batch], torch.tensor(batch))
    return statistics


def test_statistics_equal_numpy_and_sklearn():
    states, labels = random_states()
    found = fed(states, labels, [[3, 1], [0], [4, 2]]).compute()
    for site, x in states.items():
        x = x.double().numpy()
        energy = (x**2).sum((0, 1))
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
        pairs = [unit[i] @ unit[j].T for i in range(5) for j in range(5) if i != j]
        purity = np.mean([purity_of_image(x[i], labels[i].numpy()) for i in range(5)])
        assert found[site] == {
            "rms": pytest.approx(np.sqrt((x**2).mean()), rel=1e-6),
            "largest_channel": pytest.approx(energy.max() / energy.sum(), rel=1e-6),
            "anisotropy": pytest.approx(np.mean(pairs), abs=1e-6),
            "knn_purity": pytest.approx(purity, abs=1e-6),
        }
        assert 0.4 < purity < 0.99 and np.mean(pairs) > 0.05, "else the test cannot detect errors"


def test_images_with_too_few_labelled_tokens_leave_purity_alone():
    states, labels = random_states()
    labels[1] = torch.tensor([0] * 5 + [1] * 5 + [-1] * 10)  # ten labelled tokens have nine neighbours each
    labels[4] = -1
    expected = np.mean([purity_of_image(states["adapter"][i].numpy(), labels[i].numpy()) for i in (0, 2, 3)])
    assert fed(states, labels, [[0, 1, 2], [3, 4]]).compute()["adapter"]["knn_purity"] == pytest.approx(expected)


def test_what_nothing_defines_is_none():
    states, labels = random_states(1)
    found = fed(states, torch.full_like(labels, -1), [[0]]).compute()["encoder"]
    assert found["anisotropy"] is None and found["knn_purity"] is None and found["rms"] > 0


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3]], [[0, 1, 2, 3, 4], [2]]])
def test_each_image_must_be_seen_once(batches):
    states, labels = random_states()
    with pytest.raises(RuntimeError, match=r"image (4 was seen 0|2 was seen 2) times, not once"):
        fed(states, labels, batches).compute()


def test_two_ranks_give_what_one_gives():
    """States are sums, so that ranks add up."""
    states, labels = random_states()
    ranks = [fed(states, labels, batches) for batches in ([[0, 2], [4]], [[1, 3]])]
    joined = fed(states, labels, [])
    for name in joined._defaults:
        setattr(joined, name, sum(getattr(rank, name) for rank in ranks))
        assert joined._reductions[name] is torch.sum or joined._reductions[name].__name__ == "dim_zero_sum"
    whole, found = fed(states, labels, [[0, 1, 2, 3, 4]]).compute(), joined.compute()
    for site in WIDTHS:
        assert found[site] == pytest.approx(whole[site], rel=1e-6)
