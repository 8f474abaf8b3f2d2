"""Rates of a knockout, read from its tensors."""

import torch

from probes.analyses.knockout.effects import later_half, select_cases


def test_later_half_is_the_later_half_of_the_layers():
    assert later_half(torch.tensor([[0.0, 1, 2, 3, 5]])).tolist() == [4]
    assert later_half(torch.tensor([[0.0, 1, 2, 6]])).tolist() == [4]


def test_a_class_named_like_a_part_of_another_keeps_its_cases_together():
    """In the order of the keys, "a/b/..." stands between "a/image" and "a/none"."""
    tensors = {
        "a/image": torch.tensor([1, 2]),
        "a/b/image": torch.tensor([3]),
        "a/b/none": torch.full((1, 2), 3.0),
        "a/none": torch.tensor([[1.0, 1.0], [2.0, 2.0]]),
    }
    cases = select_cases(tensors)
    assert cases["none"][:, 0].tolist() == cases["image"].tolist()
