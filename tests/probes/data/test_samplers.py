"""Batches: the same images a step on any number of ranks, validation once each, resumable."""

from itertools import product

import pytest

from llava_bidir.common.errors import UserError
from probes.data.samplers import PAD_INDEX, TrainingBatches, assign_folds, validation_batches

CASES = pytest.mark.parametrize(
    ("images", "batch", "ranks"), list(product((8, 9, 17), (1, 3, 4, 16), (1, 2, 3)))
)


@CASES
def test_global_batches_do_not_depend_on_the_number_of_ranks(images, batch, ranks):
    one = TrainingBatches(images, batch, seed=5)
    many = [TrainingBatches(images, batch, rank, ranks, seed=5) for rank in range(ranks)]
    for epoch in range(2):
        for sampler in (one, *many):
            sampler.set_epoch(epoch)
        alone = list(one)
        together = list(zip(*many, strict=True))
        assert [sorted(b) for b in alone] == [
            sorted(i for b in step for i in b if i != PAD_INDEX) for step in together
        ]
        assert sorted(sum(alone, [])) == list(range(images))
        assert len(alone) == len(one)
        assert all(mine for step in together for mine in step), (
            "a rank without a batch would hold up the others"
        )


def test_skip_leaves_out_what_was_trained_once():
    sampler = TrainingBatches(10, 3)
    whole = list(sampler)
    sampler.skip(2)
    assert list(sampler) == whole[2:]
    assert list(sampler) == whole


@CASES
def test_validation_sees_each_image_once_in_as_many_batches_on_each_rank(images, batch, ranks):
    batches = [
        validation_batches(images, batch_size=batch, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    assert sorted(i for rank in batches for b in rank for i in b) == list(range(images))
    assert len({len(rank) for rank in batches}) == 1
    assert all(1 <= len(b) <= batch + (ranks > 1) for rank in batches for b in rank)


def test_more_devices_than_validation_images_is_an_error():
    with pytest.raises(ValueError, match="2 validation images for 3 devices"):
        validation_batches(2, batch_size=4, rank=0, world_size=3)


def test_folds_keep_neighbours_and_groups_together_and_differ_little_in_size():
    fold_of = assign_folds(range(100), 4)
    assert fold_of.bincount().tolist() == [25] * 4
    assert (fold_of.diff() != 0).sum() == 19, "20 blocks of 5 neighbours"
    assert assign_folds(range(1000), 4)[:16].tolist() == [0] * 8 + [1] * 8, (
        "long blocks would leave out kinds of scenes"
    )
    groups = [f"video{i // 10}" for i in range(100)]
    by_group = [set(assign_folds(groups, 4)[i : i + 10].tolist()) for i in range(0, 100, 10)]
    assert all(len(folds) == 1 for folds in by_group)
    assert set.union(*by_group) == {0, 1, 2, 3}
    with pytest.raises(UserError, match="3 training images, or groups of these, for 4 folds"):
        assign_folds("aabbcc", 4)
