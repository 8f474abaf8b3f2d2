"""Probes of one's own features against a run of `probes solve` on the same states."""

import numpy as np
import pytest
import torch
from solving import arguments

import probes
from llava_bidir.common.errors import UserError
from probes.cli import main

pytestmark = pytest.mark.numerics

SITE = "layer_02"


@pytest.fixture(scope="module")
def solved(checkpoints, segmentation, tmp_path_factory):
    """A run of one site, and the states and masks of its training images."""
    out = tmp_path_factory.mktemp("features")
    more = ("--model.sites", f"[{SITE}]")
    main(arguments(checkpoints["causal"], segmentation, out / "run", *more))
    run = probes.ProbeRun(out / "run")
    mllm = run.mllm()
    samples = [*run.dataset("training")]
    states = mllm.states(mllm.preprocess([sample["image"] for sample in samples]), [SITE])[SITE]
    features = states.unflatten(1, mllm.grid)
    return run, features, [sample["target"] for sample in samples]


def test_equals_the_run_of_a_model(solved):
    run, features, masks = solved
    (path,) = run.strengths.sites
    chosen = path["chosen"]
    probe = probes.solve_features(features, masks, len(run.metrics["classes"]), chosen, folds=2)
    assert probe.converged
    expected = path["cv_cross_entropy"][path["strengths"].index(chosen)]
    assert probe.loss == pytest.approx(expected, abs=1e-4)
    mllm = run.mllm()
    for sample in run.dataset():
        image = sample["image"]
        states = mllm.states(mllm.preprocess([image]), [SITE])[SITE].unflatten(1, mllm.grid)
        ours = probe.predict(states, (image.height, image.width))[0]
        assert (ours == run.predict(image, SITE)).mean() > 0.999


def test_copies_of_an_image_share_a_fold(solved):
    """Folds that saw their own pixels chose too weak a regularisation."""
    _, features, masks = solved
    once = probes.solve_features(features, masks, 3, folds=2)
    copied = [mask for mask in masks for _ in range(2)]
    twice = probes.solve_features(features.repeat_interleave(2, 0), copied, 3, folds=2)
    assert twice.strength == once.strength


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, m: (f.flatten(1, 2), m), "features must be floats .*got torch.float32"),
        (lambda f, m: (f, m[1:]), "images, and .* masks"),
        (lambda f, m: (f, [m[0] * 0 + 9, *m[1:]]), "mask 0.*9"),
        (lambda f, m: (f.numpy(), m), "must be a tensor, got ndarray"),
        (lambda f, m: (f * float("nan"), m), "must be finite"),
        (lambda f, m: (f, [mask * 0 + 255 for mask in m]), "no mask has a labelled pixel"),
        (lambda f, m: (f[:0], []), "folds must be 2 to 0"),
    ],
)
def test_misfits_are_errors(solved, change, message):
    _, features, masks = solved
    features, masks = change(features, [np.array(mask) for mask in masks])
    with pytest.raises(UserError, match=message):
        probes.solve_features(features, masks, 3)


@pytest.mark.parametrize(("lone", "dtypes"), [(False, ("bool", "uint16")), (True, ("int64",))])
def test_masks_of_any_integer_type_are_as_uint8(lone, dtypes):
    """Of an object in all images, or in one, whose fold it does not test."""
    features = torch.randn(4, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    masks = [(x[..., 0] > 0.5).numpy() & (not lone or i == 0) for i, x in enumerate(features)]
    expected, *others = (
        probes.solve_features(features, [mask.astype(dtype) for mask in masks], 3, folds=2)
        for dtype in ("uint8", *dtypes)
    )
    assert expected.converged
    for solution in others:
        assert solution.loss == expected.loss
        assert torch.equal(solution.weight, expected.weight)
