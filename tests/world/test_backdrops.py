"""Layers of the drawn backgrounds: honest extents, depths in order, randomness by place."""

from __future__ import annotations

import pytest
import torch

from vitascope.world.backdrops import View, backdrop, place_noise
from vitascope.world.scene import BACKGROUNDS, DRAWN_BACKGROUNDS, PLAIN_BACKGROUNDS, Scene, Subject

HALF = 2.0


def view() -> View:
    axis = torch.linspace(-HALF, HALF, 160)
    return View(axis.view(1, 1, -1), axis.view(1, -1, 1), torch.full((1, 1, 1), 2 * HALF / 160))


@pytest.mark.parametrize("background", DRAWN_BACKGROUNDS)
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_nothing_is_drawn_outside_an_extent(background: str, seed: int) -> None:
    """Stars are cut at the bottom on purpose: they are behind the night's ridge there."""
    drawing, pixels = backdrop(Scene((), background, seed=seed)), view()
    assert drawing.layers[0].draw(pixels)[1] is None, "the farthest layer covers everything"
    for layer in drawing.layers[1:]:
        cover, extent = layer.draw(pixels)[1], layer.extent
        assert cover is not None
        assert cover.min() >= 0
        assert cover.max() <= 1
        cut = background == "starry sky" and extent.bottom == 0.95
        beside = (pixels.x < extent.left - 0.05) | (pixels.x > extent.right + 0.05)
        above = (pixels.y < extent.top - 0.05) | (~torch.tensor(cut) & (pixels.y > extent.bottom + 0.05))
        assert (cover[(beside | above).expand_as(cover)] < 0.02).all()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_layers_go_from_far_to_near_behind_the_stage(background: str) -> None:
    depths = [layer.depth for layer in backdrop(Scene((), background)).layers]
    assert depths == sorted(depths, reverse=True)
    assert depths[-1] > 0
    assert len(depths) == 1 or background not in PLAIN_BACKGROUNDS


def test_bouncing_subjects_land_on_the_checkered_floor() -> None:
    ball = Subject("red", "ball", motion="bounces", y=-0.1, travel=0.5, phase=0.5, radius=0.3)
    floor = backdrop(Scene((ball,), "checkered floor")).floor
    assert floor is not None
    assert floor.y == pytest.approx(-0.1 + 0.5 + 0.3)
    assert backdrop(Scene((), "brick wall")).floor is None


def test_place_noise_depends_on_place_seed_and_name_alone() -> None:
    row, column = torch.tensor([0, -3, 5, 0]), torch.tensor([1, 2, -70000, 1])
    noise = place_noise(row, column, 3, "far")
    assert noise.shape == (3, 4)
    assert torch.equal(noise[:, 0], noise[:, 3])
    assert torch.equal(noise[:, 1:2], place_noise(row[1:2], column[1:2], 3, "far"))
    assert not torch.equal(noise, place_noise(row, column, 4, "far"))
    assert not torch.equal(noise, place_noise(row, column, 3, "near"))


def test_place_noise_is_uniform_and_uncorrelated() -> None:
    rows, columns = torch.meshgrid(torch.arange(-40, 40), torch.arange(-40, 40), indexing="ij")
    noise = place_noise(rows.flatten(), columns.flatten(), 0, "test")
    assert (noise >= 0).all()
    assert (noise < 1).all()
    assert torch.allclose(noise.mean(1), torch.full((3,), 0.5), atol=0.02)
    assert torch.allclose(noise.std(1), torch.full((3,), 12**-0.5), atol=0.01)
    field = noise[0].view(80, 80)
    together = torch.stack([field[1:].flatten(), field[:-1].flatten()])
    assert torch.corrcoef(together)[0, 1].abs() < 0.05
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.05
