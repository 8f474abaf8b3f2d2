"""Concepts painted on photos: what is taught, how it is scored, and what is said about few photos."""

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import probes
from llava_bidir.common.errors import UserError
from probes.models import teach
from probes.models.concept_folds import Paint, make_folds
from probes.models.concept_probes import solve_concepts
from probes.models.teach import MOST_REST

GREEN = (20, 160, 40)
RED = (200, 30, 30)


@pytest.fixture(scope="module")
def mllm(checkpoints):
    return probes.load(str(checkpoints["causal"]))


def photo(seed: int, left=GREEN, right=RED) -> Image.Image:
    """Return two noisy halves, each two patches of the 2 x 2 grid."""
    rng = np.random.default_rng(seed)
    pixels = np.concatenate([np.tile(np.array(c), (32, 16, 1)) for c in (left, right)], 1)
    return Image.fromarray(
        (pixels + rng.integers(-15, 16, pixels.shape)).clip(0, 255).astype(np.uint8)
    )


def patches(*rows: str) -> np.ndarray:
    return np.array([[c == "x" for c in row] for row in rows])


def halves(count: int) -> dict:
    photos = [photo(i) for i in range(count)]
    return {
        "grass": [(image, patches("x.", "x.")) for image in photos],
        "brick": [(image, patches(".x", ".x")) for image in photos],
    }


def test_masks_of_pixels_are_taught_as_the_patches_that_they_cover(mllm):
    by_patch = halves(5)
    left = np.zeros((32, 32), bool)
    left[:, :20] = True  # all of the left patches, a quarter of the right ones
    by_pixel = {
        "grass": [(image, left) for image, _ in by_patch["grass"]],
        "brick": [(image, ~left) for image, _ in by_patch["brick"]],
    }
    expected = mllm.teach(by_patch)
    taught = mllm.teach(by_pixel)
    assert torch.equal(taught.paint.patch, expected.paint.patch)
    assert taught.curve().equals(expected.curve())


def test_concepts_are_told_on_other_photos_where_the_model_tells_them(mllm):
    taught = mllm.teach(halves(6))
    curve = taught.curve()
    assert list(curve) == ["site", "score", "low", "high", "chance"]
    assert list(curve.site) == mllm.sites
    assert curve.score[0] == 1
    assert (curve.chance == 0.5).all()
    assert (curve.low <= curve.score).all()
    assert (curve.score <= curve.high).all()
    assert not taught.note
    mirrored = taught.map(photo(99, RED, GREEN), "encoder")
    assert mirrored.shape == (2, 2, 2)
    torch.testing.assert_close(mirrored.sum(0), torch.ones(2, 2))
    assert (mirrored[0, :, 1] > 0.8).all()
    assert (mirrored[1, :, 0] > 0.8).all()


def test_score_is_that_of_probes_that_have_not_seen_the_photo(mllm):
    """The concepts change sides and colours in the last photo, which probes of the other photos must get wrong."""
    painted = halves(5)
    odd = photo(77)
    painted["grass"].append((odd, patches(".x", ".x")))
    painted["brick"].append((odd, patches("x.", "x.")))
    assert mllm.teach(painted).curve().score[0] == pytest.approx(5 / 6)


def test_random_paint_is_at_chance(mllm):
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(4):
        images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(20)]
        grids = [rng.permutation([True, True, False, False]).reshape(2, 2) for _ in images]
        painted = {
            name: [(i, g == wanted) for i, g in zip(images, grids, strict=True)]
            for name, wanted in (("a", True), ("b", False))
        }
        scores.append(mllm.teach(painted).curve().score)
    assert np.mean(scores) == pytest.approx(
        0.5, abs=0.08
    )  # four times 80 patches: standard deviation 0.03


def test_intervals_of_random_paint_hold_chance():
    """With the jackknife over photos as if each had a probe of its own, 87 of these 100 did."""
    rng = torch.Generator().manual_seed(0)
    held = 0
    photo = torch.arange(10).repeat_interleave(20)
    for _ in range(100):
        states = torch.randn(200, 24, generator=rng) + torch.randn(10, 24, generator=rng)[photo]
        paint = Paint(torch.randint(2, (200,), generator=rng), photo, torch.arange(20).repeat(10))
        curve = teach.score_sites(
            solve_concepts({"x": states}, paint, make_folds(paint, 20)), {"x": states}
        )
        held += bool(curve.low[0] <= 0.5 <= curve.high[0])
    assert held >= 95


def test_photos_that_are_all_right_leave_room_for_one_that_is_not():
    paint = Paint(
        torch.arange(2).repeat(10),
        torch.arange(10).repeat_interleave(2),
        torch.arange(2).repeat(10),
    )
    states = {"x": torch.eye(2)[paint.concept]}
    curve = teach.score_sites(solve_concepts(states, paint, make_folds(paint, 2)), states)
    exact = scipy.stats.binomtest(10, 10).proportion_ci(0.95, "exact")
    assert curve.score[0] == 1
    assert (curve.low[0], curve.high[0]) == pytest.approx((exact.low, exact.high))


def test_random_curve_has_the_same_encoder_and_gives_the_trained_weights_back(mllm):
    taught = mllm.teach(halves(5))
    before = taught.map(photo(50), "layer_03")
    trained = taught.curve()
    random = taught.random_curve()
    assert list(random.site) == mllm.sites
    assert random.score[0] == trained.score[0]
    assert torch.equal(taught.map(photo(50), "layer_03"), before)
    with probes.models.random_init.random_layers(mllm, match_images=taught.photos):
        expected = mllm.teach(halves(5)).curve()
    assert random.equals(expected)


def test_one_photo_warns_that_its_patches_resemble_each_other(mllm):
    image = photo(0)
    painted = {"grass": [(image, patches("x.", "x."))], "brick": [(image, patches(".x", ".x"))]}
    with pytest.warns(UserWarning, match="There is one photo.*resemble each other"):
        curve = mllm.teach(painted).curve()
    assert curve.score.notna().all()
    assert curve.low.isna().all()
    assert curve.high.isna().all()
    painted["brick"] = [(image, patches(".x", ".."))]
    with pytest.warns(UserWarning, match="single patch"):
        assert mllm.teach(painted).curve().score.isna().all()


def test_a_concept_is_not_called_as_the_rest_is(mllm):
    painted = halves(2)
    painted["background"] = painted.pop("grass")
    with pytest.raises(UserError, match="rename it"):
        mllm.teach(painted, rest_is_background=True)


def test_one_concept_needs_the_rest_as_background(mllm):
    grass = {"grass": halves(5)["grass"]}
    with pytest.raises(UserError, match="let the rest be background"):
        mllm.teach(grass)
    taught = mllm.teach(grass, rest_is_background=True)
    assert taught.concepts == ["grass", "background"]
    assert len(taught.paint.concept) == 20
    assert taught.curve().score[0] == 1


def test_the_rest_is_a_bounded_even_sample_of_all_photos():
    grids = [torch.full((400,), -1) for _ in range(5)]
    for grid in grids:
        grid[:10] = 0
    paint = teach.paint_of(grids, 2, True)
    rest = paint.photo[paint.concept == 1].bincount()
    assert rest.sum() == MOST_REST
    assert (rest - MOST_REST / 5).abs().max() <= 1
    assert (paint.concept == 0).sum() == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, i: p.update(grass=[]), "'grass' has no photo"),
        (lambda p, i: p.update(grass=[(i, patches("..", ".."))]), "'grass' has no painted patch"),
        (
            lambda p, i: p.update(grass=[("x.png", patches("x.", ".."))]),
            "x.png is missing; expected a photo",
        ),
        (
            lambda p, i: p.update(grass=[(i, patches("x.."))]),
            r"expected painted patches bool\[2, 2\], or pixels of the photo bool\[\d+, \d+\], got bool\[1, 3\]",
        ),
        (lambda p, i: p.update(grass=[(i, np.ones((2, 2)))]), r"got float64\[2, 2\]"),
        (
            lambda p, i: p["grass"].append((p["brick"][0][0], patches(".x", ".."))),
            "patch 1 of a photo is painted as 'grass' and 'brick'",
        ),
        (lambda p, i: p["grass"].append((i,)), "expected pairs"),
        (lambda p, i: p["grass"].append((i, None)), "as an array, got NoneType"),
        (lambda p, i: p.clear(), "got no concepts"),
    ],
)
def test_invalid_paint_is_named(mllm, change, message):
    painted = halves(2)
    change(painted, photo(9))
    with pytest.raises(UserError, match=message):
        mllm.teach(painted)
