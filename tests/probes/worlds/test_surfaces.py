"""Depth, normals and objects of scenes against ray tracing and finite differences."""

import numpy as np
import pytest

from probes.worlds.canvas import SIZE_PX, Canvas, sample_camera
from probes.worlds.scenes import draw_room, draw_scene
from probes.worlds.surfaces import ADULT_M, FOCAL_PX

CEILING, SKY, WALL, BUILDING, FLOOR, ROAD, BED, CAR, LAMP, TREE, PICTURE, WINDOW, DOOR, PERSON = (
    range(14)
)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [draw_scene(rng) for _ in range(150)]


def trace_room(camera) -> np.ndarray:
    """Return the depth of an empty room in metres, f64[H, W], by the nearest wall on the ray of each pixel."""
    (eye_x, eye_y), far = camera.eye, camera.far_end
    # Of the far wall, whose lower edge is on the ground
    distance = FOCAL_PX * ADULT_M / (far.bottom_left[1] - eye_y)

    def metres(corner):
        return (
            (corner[0] - eye_x) * distance / FOCAL_PX,
            (corner[1] - eye_y) * distance / FOCAL_PX,
        )

    (left, ceiling), (right, ground) = metres(far.top_left), metres(far.bottom_right)
    assert ground == pytest.approx(ADULT_M)
    depth = np.full((SIZE_PX, SIZE_PX), distance)
    for y in range(SIZE_PX):
        for x in range(SIZE_PX):
            across = (x + 0.5 - eye_x) / FOCAL_PX
            down = (y + 0.5 - eye_y) / FOCAL_PX
            hits = [
                (right if across > 0 else left) / across,
                (ground if down > 0 else ceiling) / down,
            ]
            depth[y, x] = min(distance, *hits)
    return depth


def test_room_has_the_depth_of_a_box_by_ray_tracing():
    rng = np.random.default_rng(1)
    for _ in range(5):
        camera = sample_camera(rng)
        canvas = Canvas()
        draw_room(canvas, camera, rng)
        depth = canvas.surfaces(camera).depth()
        mask = canvas.mask()
        room = np.isin(mask, (CEILING, WALL, FLOOR, WINDOW, PICTURE, DOOR)) & ~np.isnan(depth)
        assert room.mean() > 0.4
        # along the edges, the other plane is at most a third of a pixel away
        assert (abs(depth / trace_room(camera) - 1)[room] < 1e-6).mean() > 0.97
        assert abs(depth / trace_room(camera) - 1)[room].max() < 0.05


def test_normals_are_those_of_the_points_that_depth_gives(scenes):
    """Cross products of the differences between neighbouring points in space."""
    compared = 0
    for scene in scenes[:20]:
        depth, (eye_x, eye_y) = scene.surfaces.depth().astype(np.float64), scene.surfaces.eye
        rows, columns = np.indices(depth.shape) + 0.5
        points = np.stack(
            [(columns - eye_x) * depth / FOCAL_PX, (rows - eye_y) * depth / FOCAL_PX, depth], -1
        )
        normals = np.cross(points[1:, :-1] - points[:-1, :-1], points[:-1, 1:] - points[:-1, :-1])
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        # Towards the viewer
        normals *= -np.sign((normals * points[:-1, :-1]).sum(-1, keepdims=True))
        normals[..., 2] *= -1  # so points z
        index = scene.surfaces.index
        inside = (
            (index[:-1, :-1] == index[1:, :-1])
            & (index[:-1, :-1] == index[:-1, 1:])
            & ~np.isnan(depth[:-1, :-1])
        )
        given = scene.surfaces.normals()[:-1, :-1]
        np.testing.assert_allclose(given[inside], normals[inside], atol=1e-3)
        compared += inside.sum()
    assert compared > 100_000
    assert {tuple(normal) for normal in given[inside].round(3) + 0.0} > {(0, 0, 1), (0, -1, 0)}


def test_objects_are_finer_than_classes(scenes):
    for scene in scenes:
        objects = scene.surfaces.instance_ids()
        for number in np.unique(objects):
            assert len(np.unique(scene.mask[objects == number])) == 1
    people = [len(np.unique(s.surfaces.instance_ids()[s.mask == PERSON])) for s in scenes]
    assert set(people) == {0, 1, 2}
    walls = [len(np.unique(s.surfaces.instance_ids()[s.mask == WALL])) for s in scenes if s.indoor]
    assert max(walls) == 3, "left, far and right"
