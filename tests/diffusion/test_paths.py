"""Paths: coefficients, their ends, and the four predictions there and back."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch

from vitascope.core.errors import InputError
from vitascope.core.protocols import Prediction
from vitascope.diffusion.paths import PREDICTIONS, Path, RectifiedFlow, VariancePreserving

PATHS: dict[str, Path] = {
    "flow": RectifiedFlow(),
    "cosine": VariancePreserving("cosine"),
    "cosine_shifted": VariancePreserving("cosine", shift=4.0),
    "scaled_linear": VariancePreserving("scaled_linear"),
    "zero_terminal": VariancePreserving("scaled_linear", zero_terminal_snr=True),
    "zero_terminal_shifted": VariancePreserving("scaled_linear", shift=2.0, zero_terminal_snr=True),
}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@each_path
def test_signal_falls_and_noise_rises_from_known_cells_on(path: Path) -> None:
    alpha, sigma = path.alpha_sigma(torch.linspace(0, 1, 501))
    assert alpha.dtype == torch.float64
    assert (alpha[0].item(), sigma[0].item()) == (1.0, 0.0)
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    if isinstance(path, VariancePreserving):
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


def test_terminal_signal() -> None:
    one = torch.ones(1)
    for name, path in PATHS.items():
        assert (path.alpha(one).item() == 0) == (name != "scaled_linear")
    assert PATHS["scaled_linear"].alpha(one).item() == pytest.approx(0.0682, abs=1e-4)  # alpha-bar 0.00466


def test_cosine_is_the_published_formula() -> None:
    def f(t: float) -> float:
        return cos((t + 0.008) / 1.008 * pi / 2)

    for level in (0.1, 0.5, 0.9):
        assert PATHS["cosine"].alpha(torch.tensor(level, dtype=torch.float64)).item() == pytest.approx(
            f(level) / f(0.0), rel=1e-12
        )


def test_scaled_linear_is_the_table_of_stable_diffusion() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    levels = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    plain = DDIMScheduler(**options)
    alpha = PATHS["scaled_linear"].alpha(levels)
    torch.testing.assert_close(alpha**2, plain.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    zero = DDIMScheduler(**options, rescale_betas_zero_snr=True)
    alpha = PATHS["zero_terminal"].alpha(levels)
    torch.testing.assert_close(alpha**2, zero.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)


def test_shift_divides_the_signal_to_noise_ratio() -> None:
    level = torch.linspace(0.05, 0.95, 7)
    difference = PATHS["cosine"].log_snr(level) - PATHS["cosine_shifted"].log_snr(level)
    torch.testing.assert_close(difference, torch.full_like(difference, 2 * torch.tensor(4.0).log().item()))


@each_path
def test_level_of_undoes_the_noise_to_signal_ratio(path: Path) -> None:
    level = torch.tensor([0.01, 0.3, 0.8], dtype=torch.float64)
    torch.testing.assert_close(path.level_of(path.sigma(level) / path.alpha(level)), level)


@each_path
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_predictions_there_and_back_with_a_level_per_frame(path: Path, kind: Prediction) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 3, 5, 4, 4, generator=generator)
    level = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99]).reshape(1, 1, 5, 1, 1).expand(2, -1, -1, -1, -1)
    x = path.add_noise(x0, noise, level)
    prediction = path.target(kind, x0, noise, level)
    torch.testing.assert_close(path.to_x0(kind, prediction, x, level), x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(path.from_x0(kind, x0, x, level), prediction, rtol=1e-3, atol=1e-3)


@each_path
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_the_ends_are_finite(path: Path, kind: Prediction, level: float) -> None:
    x0, noise = torch.full((1, 1, 3), 0.5), torch.full((1, 1, 3), -2.0)
    levels = torch.full((1, 1, 1), level)
    x = path.add_noise(x0, noise, levels)
    prediction = path.from_x0(kind, x0, x, levels)
    assert prediction.isfinite().all()
    back = path.to_x0(kind, prediction, x, levels)
    blind = kind == "noise" and path.alpha(levels).item() == 0
    torch.testing.assert_close(back, torch.zeros_like(x0) if blind else x0, atol=1e-5, rtol=1e-5)


def test_low_precision_values_are_converted_in_float32() -> None:
    x = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    x0 = RectifiedFlow().to_x0("velocity", x, x, torch.full((1, 1, 1), 0.3))
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, torch.full((1, 1, 2), 0.7))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="velocity, v, noise, x0"):
        RectifiedFlow().to_x0("score", torch.ones(1), torch.ones(1), torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cosine, scaled_linear"):
        VariancePreserving("linear")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="positive"):
        VariancePreserving(shift=0.0)
