"""Embeddings of levels, seconds, places, cameras and labels."""

from __future__ import annotations

from math import cos, pi, sin

import pytest
import torch
from torch import nn

from vitascope.core.errors import InputError, ShapeError
from vitascope.nn.embeddings import CameraEmbedding, LabelEmbedding, LevelEmbedding, SpatialPositions, sinusoidal


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_sinusoids_have_the_given_periods() -> None:
    features = sinusoidal(torch.tensor([0.0, 0.25]), 4, min_period=1.0, max_period=4.0)
    slow = 2 * pi * 0.25 / 4
    torch.testing.assert_close(features[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(features[1], torch.tensor([0.0, cos(slow), 1.0, sin(slow)]), rtol=1e-5, atol=1e-6)


def test_levels_of_any_shape_are_embedded_one_by_one() -> None:
    embed = LevelEmbedding(12)
    levels = torch.rand(2, 3, 4)
    out = embed(levels)
    assert out.shape == (2, 3, 4, 12)
    torch.testing.assert_close(out[1, 2, 3], embed(levels[1, 2, 3]))
    # levels a hundredth apart are told apart before the first weight
    near = sinusoidal(torch.tensor([0.5, 0.51]), LevelEmbedding.NUM_SINUSOIDS, 0.01, 8.0)
    assert (near[0] - near[1]).norm() > 0.5


def test_spatial_positions_are_the_table_on_their_own_grid_and_resampled_elsewhere() -> None:
    places = SpatialPositions(3, 4, 8)
    assert torch.equal(places(3, 4), places.grid[0].permute(1, 2, 0).reshape(12, 8))
    with torch.no_grad():  # a constant stays constant, whatever the grid; a column ramp stays one along the columns
        places.grid[:, 0] = 0.7
        places.grid[:, 1] = torch.arange(4.0)
    for rows, columns in ((3, 8), (7, 5), (1, 1), (2, 3)):
        out = places(rows, columns)
        assert out.shape == (rows * columns, 8)
        torch.testing.assert_close(out[:, 0], torch.full((rows * columns,), 0.7))
        ramp = out[:, 1].view(rows, columns)
        torch.testing.assert_close(ramp, ramp[:1].expand_as(ramp))
        assert (ramp[0].diff() > 0).all()


def test_positions_train_through_the_resampling() -> None:
    places = SpatialPositions(2, 2, 4)
    places(3, 5).sum().backward()
    assert places.grid.grad is not None
    assert places.grid.grad.abs().min() > 0


def make_camera() -> CameraEmbedding:
    camera = CameraEmbedding(10)
    nn.init.normal_(camera.absent)
    return camera


def test_a_missing_camera_is_the_learned_vector_per_clip_and_per_frame() -> None:
    camera = make_camera()
    path = torch.randn(3, 4, 7)
    path[0] = float("nan")
    path[1, 2, 5] = float("nan")
    out = camera(path)
    assert torch.equal(camera(None)[0, 0], camera.absent)
    assert torch.equal(out[0], camera.absent.expand(4, -1))
    assert torch.equal(out[1, 2], camera.absent)
    torch.testing.assert_close(out[2], camera(path[2:])[0])
    assert not out.isnan().any()
    out.sum().backward()
    for parameter in camera.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_the_field_of_view_is_read_in_degrees() -> None:
    """From 50 to 60 degrees moves the features as 10 degrees of yaw do, not as 10 radians would."""
    camera = make_camera()
    seen: list[torch.Tensor] = []
    camera.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for degrees in (0.0, 30.0):
        path = torch.zeros(1, 1, 7)
        path[..., 6] = degrees
        camera(path)
    path = torch.zeros(1, 1, 7)
    path[..., 3] = pi / 6
    camera(path)
    assert seen[1][0, 0, 6].item() == pytest.approx(pi / 6)
    assert (seen[1] - seen[0]).norm().item() == pytest.approx((seen[2] - seen[0]).norm().item(), rel=1e-5)


def test_other_shapes_of_cameras_are_refused() -> None:
    for shape in ((2, 3, 6), (3, 7)):
        with pytest.raises(ShapeError, match=r"\(B, T, 7\)"):
            make_camera()(torch.zeros(shape))


def test_labels_are_texts_of_one_token() -> None:
    embed = LabelEmbedding(3, 5)
    context = embed(torch.tensor([-1, 0, 2, 0]))
    assert context.embeddings.shape == (4, 1, 5)
    assert context.mask.all()
    assert torch.equal(context.embeddings[:, 0], embed.table.weight[[0, 1, 3, 1]])
    for label in (-2, 3):
        with pytest.raises(InputError, match=r"0\.\.2"):
            embed(torch.tensor([0, label]))
