"""Every sampler: the right distribution, its measured order, cells with their own levels, sound refusals.

The data are known: x0 ~ N(MEAN, SPREAD^2) in each cell. At level t, x ~ N(alpha MEAN, alpha^2 SPREAD^2 + sigma^2), and
the flow from noise to data keeps (x - mean) / std, so every sampler has an exact answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitascope.core.errors import InputError
from vitascope.core.tracks import Track
from vitascope.diffusion.paths import PREDICTIONS, Path, RectifiedFlow, VariancePreserving
from vitascope.diffusion.samplers import SAMPLERS, Denoise, Sampler, Step, sampler_named
from vitascope.diffusion.schedules import karras_levels, shifted_levels, uniform_levels

MEAN, SPREAD = 0.7, 0.4

PATHS: dict[str, Path] = {
    "flow": RectifiedFlow(),
    "cosine": VariancePreserving("cosine"),
    "scaled_linear": VariancePreserving("scaled_linear"),
    "zero_terminal": VariancePreserving("scaled_linear", shift=2.0, zero_terminal_snr=True),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
DETERMINISTIC = [name for name in SAMPLERS if name != "few_step"]


def audio(values: Tensor, noise: Tensor | float) -> Track:
    """A track of values (B, C, T); one level for all cells, or levels of any shape that fits."""
    levels = noise if isinstance(noise, Tensor) else torch.full((values.shape[0], 1, values.shape[2]), noise)
    return Track(values, levels.to(values.dtype), torch.arange(values.shape[2]) / 10)


def posterior_mean(path: Path) -> Denoise:
    """The best x0: E[x0 | x] of every cell."""

    def denoise(tracks: dict[str, Track]) -> dict[str, Tensor]:
        x0 = {}
        for name, track in tracks.items():
            alpha, sigma = path.alpha_sigma(track.noise)
            gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
            x0[name] = (MEAN + gain * (track.values - alpha * MEAN)).to(track.values.dtype)
        return x0

    return denoise


def place(path: Path, z: Tensor, level: float) -> Tensor:
    """Where the flow passes at `level` on its way to MEAN + SPREAD z."""
    alpha, sigma = path.alpha_sigma(torch.tensor(level, dtype=torch.float64))
    return alpha * MEAN + (alpha**2 * SPREAD**2 + sigma**2).sqrt() * z


def sample(
    sampler: Sampler, path: Path, tracks: dict[str, Track], levels: Sequence[float], denoise: Denoise | None = None
) -> list[Step]:
    generator = torch.Generator().manual_seed(5)
    return list(sampler(denoise or posterior_mean(path), tracks, levels, path=path, generator=generator))


@each_path
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_samples_have_the_mean_and_spread_of_the_data(name: str, path: Path) -> None:
    z = torch.randn(4, 2, 2500, generator=torch.Generator().manual_seed(0))
    levels = karras_levels(60, path, ratio_min=0.01)
    last = sample(SAMPLERS[name], path, {"audio": audio(place(path, z, 1.0).float(), 1.0)}, levels)[-1]
    values = last.tracks["audio"].values
    tolerance = 0.03 if name == "euler" else 0.01
    assert values.mean().item() == pytest.approx(MEAN, abs=tolerance)
    assert values.std().item() == pytest.approx(SPREAD, rel=2 * tolerance)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("path", [PATHS["flow"], PATHS["cosine"], PATHS["scaled_linear"]])
def test_measured_order_of_convergence(name: str, path: Path) -> None:
    """The error against the exact flow from level 0.9 to 0.1, when the number of steps doubles."""
    least, most = {"euler": (0.95, 1.1), "heun": (1.9, 2.1), "dpmpp_2m": (1.8, 2.3), "unipc": (2.1, 3.2)}[name]
    z = torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(1, 1, 5)
    errors = []
    for num_steps in (40, 80, 160):
        levels = [0.9 - 0.8 * i / num_steps for i in range(num_steps + 1)]
        last = sample(SAMPLERS[name], path, {"audio": audio(place(path, z, 0.9), 0.9)}, levels)[-1]
        errors.append((last.tracks["audio"].values - place(path, z, levels[-1])).abs().max().item())
    for before, after in pairwise(errors):
        assert least < log2(before / after) < most


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "unipc"])
def test_whole_runs_on_rectified_flow_beat_euler(name: str) -> None:
    path = PATHS["flow"]
    z = torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(1, 1, 5)
    errors = {}
    for sampler in ("euler", name):
        track = audio(place(path, z, 1.0), 1.0)
        last = sample(SAMPLERS[sampler], path, {"audio": track}, uniform_levels(20))[-1]
        errors[sampler] = (last.tracks["audio"].values - place(path, z, 0.0)).abs().max().item()
    assert errors[name] < errors["euler"] / 5


@each_sampler
@each_path
def test_the_four_predictions_take_the_same_way(name: str, path: Path) -> None:
    x = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = posterior_mean(path)

    def through(kind: str) -> Denoise:
        def denoise(tracks: dict[str, Track]) -> dict[str, torch.Tensor]:
            track, x0 = tracks["audio"], exact(tracks)["audio"]
            prediction = path.from_x0(kind, x0, track.values, track.noise)  # type: ignore[arg-type]
            return {"audio": path.to_x0(kind, prediction, track.values, track.noise)}  # type: ignore[arg-type]

        return denoise

    runs = [
        sample(SAMPLERS[name], path, {"audio": audio(x, 0.95)}, uniform_levels(6, start=0.95), through(kind))
        for kind in PREDICTIONS
    ]
    for steps in zip(*runs, strict=True):
        for step in steps[1:]:
            torch.testing.assert_close(step.tracks["audio"].values, steps[0].tracks["audio"].values)


@each_sampler
@each_path
def test_a_track_of_mixed_levels_ends_right(name: str, path: Path) -> None:
    """Known cells stay bit for bit, cells at 0.4 wait until the schedule is there, cells at 1 start from noise."""
    x = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(3))
    start = torch.tensor([0.0, 0.4, 1.0, 0.0, 0.47, 1.0]).reshape(1, 1, 6)
    track = audio(x, start)
    levels = uniform_levels(10)
    steps = sample(SAMPLERS[name], path, {"audio": track, "video": _video(x)}, levels)
    assert [step.index for step in steps] == list(range(10))
    for step, level in zip(steps, levels[1:], strict=True):
        now = step.tracks["audio"]
        assert (step.level, step.num_steps) == (level, 10)
        torch.testing.assert_close(now.noise, start.clamp(max=level))
        waiting = (start.double() <= level).expand_as(x)
        assert torch.equal(now.values[waiting], x[waiting])
        moved = (start.double() > level + 1e-6).expand_as(x)  # 0.4 in float32 is a trace above 0.4
        assert (now.values != x)[moved].all()
    final = steps[-1].tracks
    assert torch.equal(final["video"].values[:, :, 0], _video(x).values[:, :, 0])
    assert (final["audio"].noise == 0).all()
    assert final["audio"].values.isfinite().all()
    for name_ in final:
        assert steps[-1].x0[name_].shape == final[name_].values.shape


@pytest.mark.parametrize("name", DETERMINISTIC)
@each_path
def test_a_cell_moves_as_if_it_were_alone(name: str, path: Path) -> None:
    """Where cells do not look at each other, one that starts at 0.4 among others goes as in a run from 0.4."""
    x = torch.randn(1, 1, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mixed = audio(x, torch.tensor([1.0, 0.4], dtype=torch.float64).reshape(1, 1, 2))
    levels = [1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.0]
    together = sample(SAMPLERS[name], path, {"audio": mixed}, levels)[-1].tracks["audio"].values
    alone = sample(SAMPLERS[name], path, {"audio": audio(x[..., 1:], 0.4)}, levels[3:])[-1].tracks["audio"].values
    torch.testing.assert_close(together[..., 1:], alone)


@each_sampler
@given(start=st.lists(st.floats(0, 1), min_size=3, max_size=3), shift=st.floats(0.3, 8), num_steps=st.integers(1, 7))
def test_any_levels_stay_finite_and_end_at_zero(name: str, start: list[float], shift: float, num_steps: int) -> None:
    x = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(3))
    track = audio(x, torch.tensor(start).reshape(1, 1, 3))
    for path in PATHS.values():
        last = sample(SAMPLERS[name], path, {"audio": track}, shifted_levels(num_steps, shift))[-1].tracks["audio"]
        assert last.values.isfinite().all()
        assert last.values.abs().max() < 20
        assert (last.noise == 0).all()


@each_sampler
def test_the_same_seed_gives_the_same_clip(name: str) -> None:
    x = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(3))
    runs = [sample(SAMPLERS[name], RectifiedFlow(), {"audio": audio(x, 1.0)}, uniform_levels(5))[-1] for _ in range(2)]
    assert torch.equal(runs[0].tracks["audio"].values, runs[1].tracks["audio"].values)


def test_few_step_jumps_to_x0_and_adds_fresh_noise() -> None:
    path = VariancePreserving("cosine")
    x = torch.zeros(1, 1, 40_000)
    target = 0.5

    def denoise(tracks: dict[str, Track]) -> dict[str, torch.Tensor]:
        return {"audio": torch.full_like(tracks["audio"].values, target)}

    steps = sample(SAMPLERS["few_step"], path, {"audio": audio(x, 1.0)}, [1.0, 0.6, 0.3, 0.0], denoise)
    for step in steps:
        alpha, sigma = path.alpha_sigma(torch.tensor(step.level))
        values = step.tracks["audio"].values
        assert values.mean().item() == pytest.approx(alpha.item() * target, abs=0.02)
        assert values.std().item() == pytest.approx(sigma.item(), abs=0.02)
    first, second = ((s.tracks["audio"].values - s.tracks["audio"].values.mean()).flatten() for s in steps[:2])
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.02
    assert torch.equal(steps[-1].tracks["audio"].values, torch.full_like(x, target))


@each_sampler
def test_gradients_are_finite_beside_known_cells(name: str) -> None:
    """Distillation differentiates through a run; coefficients of known cells must not turn into NaN."""
    x = torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(3))
    weight = torch.tensor(1.0, requires_grad=True)
    exact = posterior_mean(RectifiedFlow())
    track = audio(x, torch.tensor([0.0, 0.4, 1.0]).reshape(1, 1, 3))

    def denoise(tracks: dict[str, Track]) -> dict[str, torch.Tensor]:
        return {"audio": weight * exact(tracks)["audio"]}

    steps = sample(SAMPLERS[name], RectifiedFlow(), {"audio": track}, uniform_levels(4), denoise)
    (gradient,) = torch.autograd.grad(steps[-1].tracks["audio"].values.sum(), weight)
    assert gradient.isfinite()
    assert gradient.item() != 0


def test_bad_requests_are_refused() -> None:
    with pytest.raises(InputError, match="euler, heun, dpmpp_2m, unipc, few_step"):
        sampler_named("ddpm")
    assert sampler_named("heun") is SAMPLERS["heun"]
    track = {"audio": audio(torch.zeros(1, 1, 2), 1.0)}
    with pytest.raises(InputError, match="below cells at level 1"):
        sample(SAMPLERS["euler"], RectifiedFlow(), track, [0.8, 0.0])
    with pytest.raises(InputError, match="must fall"):
        sample(SAMPLERS["euler"], RectifiedFlow(), track, [1.0, 0.0, 0.0])
    with pytest.raises(InputError, match="generator"):
        next(SAMPLERS["few_step"](posterior_mean(RectifiedFlow()), track, [1.0, 0.0], path=RectifiedFlow()))


def _video(x: torch.Tensor) -> Track:
    """Six channels a cell of a 2x1 picture in three frames, of which the first is known; one level a frame."""
    values = x.reshape(1, 3, 3, 2, 1)
    return Track(values, torch.tensor([0.0, 1.0, 1.0]).reshape(1, 1, 3, 1, 1), torch.arange(3.0))
