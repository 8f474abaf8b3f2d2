"""LLaVA's two samplers: complete, one modality a batch, cut alike on every rank, resumable."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_bidir.data.batch_samplers import BatchSampler, grouped_batches, random_batches

LENGTHS = np.array([*range(5, 45), *(-n for n in range(3, 20))])  # 40 with an image, 17 without
DRAWS = (random_batches, grouped_batches)


@pytest.mark.parametrize("draw", DRAWS)
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=80),
    micro=st.integers(1, 4),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 3),
)
def test_every_sample_is_drawn_and_ranks_get_as_many(draw, lengths, micro, world, accumulate):
    lengths = np.array(lengths)
    size = micro * world * accumulate
    ranks = [
        [
            *BatchSampler(
                lengths=lengths,
                global_batch_size=size,
                batch_size=micro,
                draw=draw,
                rank=rank,
                world_size=world,
            )
        ]
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) % accumulate == 0
    assert all(len(batch) == micro for batches in ranks for batch in batches)
    drawn = Counter(i for batches in ranks for batch in batches for i in batch)
    assert set(drawn) == set(range(len(lengths)))
    repeats = sum(drawn.values()) - len(lengths)
    assert repeats < size, "only the last global batch is topped up"


def llava_megabatches(lengths: list[int], batch: int, devices: int, generator) -> list[list[int]]:
    """get_modality_length_grouped_indices, split_to_even_chunks on lists. Source: LLaVA llava_trainer.py:38-130."""
    megabatches = []
    rest = []
    for text_only in (False, True):
        indices = [i for i, n in enumerate(lengths) if (n < 0) == text_only]
        order = [indices[i] for i in torch.randperm(len(indices), generator=generator)]
        chunks = [order[i : i + batch] for i in range(0, len(order), batch)]
        if chunks and len(chunks[-1]) < batch:
            rest += chunks.pop()
        for chunk in chunks:
            parts = [[] for _ in range(devices)]
            for index in sorted(chunk, key=lambda i: abs(lengths[i]), reverse=True):
                unfilled = [part for part in parts if len(part) < batch // devices]
                min(unfilled, key=lambda part: sum(abs(lengths[i]) for i in part)).append(index)
            megabatches.append([i for part in parts for i in part])
    shuffled = [megabatches[i] for i in torch.randperm(len(megabatches), generator=generator)]
    return [*shuffled, sorted(rest)] if rest else shuffled


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(-30, 30).filter(bool), min_size=1, max_size=120),
    micro=st.integers(1, 4),
    devices=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_grouped_batches_are_llavas_with_the_longest_in_front(lengths, micro, devices, seed):
    """Same draws, same batches: of the full ones two change places, and the last are cut and topped up."""
    batch = micro * devices
    ours = grouped_batches(
        np.array(lengths),
        batch_size=batch,
        micro_batch_size=micro,
        generator=torch.Generator().manual_seed(seed),
    ).tolist()
    theirs = llava_megabatches(
        lengths, batch=batch, devices=devices, generator=torch.Generator().manual_seed(seed)
    )
    full = sum((n < 0) for n in lengths) // batch + sum((n > 0) for n in lengths) // batch
    moved = [i for i in range(full) if ours[i] != theirs[i]]
    assert moved in ([], [0, moved[-1] if moved else 0])
    assert sorted(ours[:full]) == sorted(theirs[:full])
    rest = [i for row in ours[full:] for i in row]
    last = theirs[full] if len(theirs) > full else []
    assert rest[: len(last)] == last
    longest = [max(abs(lengths[i]) for i in row) for row in ours[:full]]
    assert not longest or longest[0] == max(longest)


@pytest.mark.parametrize("draw", DRAWS)
def test_skipping_goes_on_where_an_interrupted_pass_stopped(draw):
    sampler = BatchSampler(lengths=LENGTHS, global_batch_size=8, batch_size=4, draw=draw)
    everything = [*sampler]
    sampler.start = 5
    assert [*sampler] == everything[5:] and [*sampler] == everything, "only once"
    assert len(sampler) == len(everything)


def test_batch_that_does_not_divide_is_an_error():
    message = "batch_size 128 is not a multiple of data.micro_batch_size 16 x 3 devices"
    with pytest.raises(ValueError, match=message):
        BatchSampler(LENGTHS, 128, 16, world_size=3)
