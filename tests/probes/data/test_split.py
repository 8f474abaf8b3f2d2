"""A share of photos, whole groups, is drawn by seed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_bidir.common.errors import UserError
from probes.data.split import split_names

FRAMES = [f"video{video}_{frame:03d}" for video in range(10) for frame in range(1 + video)]


@given(st.floats(0.05, 0.95), st.integers(0, 99))
def test_groups_stay_together_and_each_photo_is_in_one_split(share, seed):
    training, validation = split_names(FRAMES, share, seed, r"(video\d+)_")
    assert sorted(training + validation) == FRAMES
    assert not {x.split("_")[0] for x in training} & {x.split("_")[0] for x in validation}
    # the next group could be taken or left
    assert abs(len(validation) - share * len(FRAMES)) <= 10
    assert split_names(FRAMES, share, seed, r"(video\d+)_") == (training, validation)


def test_another_seed_draws_others():
    draws = {tuple(split_names(FRAMES, 0.3, seed)[1]) for seed in range(5)}
    assert len(draws) == 5
    assert {len(names) for names in draws} <= {16, 17}


@pytest.mark.parametrize(
    ("groups", "share", "message"),
    [
        ("(", 0.5, "no regular expression"),
        ("x", 0.5, "nothing in 'video0_000'"),
        ("v", 0.5, "empty"),
    ],
)
def test_what_makes_no_split_is_refused(groups, share, message):
    with pytest.raises(UserError, match=message):
        split_names(FRAMES, share, 0, groups)
