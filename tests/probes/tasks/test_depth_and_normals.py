"""Losses and colours of depth and normals; their scores are in tests/probes/fit/test_tasks.py."""

import numpy as np
import torch
import torch.nn.functional as F

from probes.tasks.depth import HIGHEST_M, Depth
from probes.tasks.normals import Normals


def test_depth_loss_is_the_scale_invariant_log_loss_of_each_image():
    generator = torch.Generator().manual_seed(0)
    target = 0.5 + torch.rand((2, 6, 7), generator=generator)
    target[0, :3] = torch.nan
    maps = torch.randn((3, 2, 1, 6, 7), generator=generator, requires_grad=True)
    ours = Depth().image_losses(maps, target)
    for p, b in np.ndindex(3, 2):
        valid = target[b].isfinite()
        g = maps[p, b, 0][valid] - target[b][valid].log()
        torch.testing.assert_close(ours[p, b], (g.var(correction=0) + 0.15 * g.mean() ** 2).sqrt())
    (gradient,) = torch.autograd.grad(ours.sum(), maps)
    assert gradient.isfinite().all()
    assert (gradient[:, 0, :, :3] == 0).all()
    assert (gradient[:, 1] != 0).any()


def test_depth_loss_without_a_value_or_an_error_has_no_gradient():
    maps = torch.zeros((1, 2, 1, 4, 4), requires_grad=True)
    target = torch.stack([torch.full((4, 4), torch.nan), torch.ones(4, 4)])
    loss = Depth().image_losses(maps, target)
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    assert (loss == 0).all()
    assert (gradient == 0).all()


def test_depth_of_a_bad_probe_is_finite():
    assert Depth().predict(torch.full((1, 2, 2), 500.0)).max() == HIGHEST_M


def test_near_pixels_are_bright_and_axes_are_colours():
    values = Depth().colorize(np.array([[0.5, 2.0, 8.0]])).sum(-1, dtype=int)[0]
    assert values[0] > values[1] > values[2]
    assert Normals().colorize(np.array([0.0, -1.0, 1.0])).tolist() == [128, 0, 255]


def test_normals_loss_is_one_minus_the_cosine():
    generator = torch.Generator().manual_seed(0)
    target = F.normalize(torch.randn((1, 5, 6, 3), generator=generator), dim=-1)
    target[0, 0] = torch.nan
    maps = torch.randn((2, 1, 3, 5, 6), generator=generator)
    ours = Normals().image_losses(maps, target)
    for p in range(2):
        cosine = F.cosine_similarity(maps[p, 0].movedim(0, -1)[1:], target[0, 1:], dim=-1)
        torch.testing.assert_close(ours[p, 0], 1 - cosine.mean())
