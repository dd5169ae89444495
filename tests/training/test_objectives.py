"""Losses of the codecs and of the text encoder, against what can be worked out by hand."""

from __future__ import annotations

from math import log, pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from vitascope.core.errors import InputError
from vitascope.core.tracks import TextContext
from vitascope.training.objectives.attributes import QUESTIONS, AttributeReader, answers, reading_loss
from vitascope.training.objectives.audio_codec import (
    DEFAULT_SCALES,
    SpectralScales,
    SpectralScore,
    energy_score,
    log_mel,
    mel_bank,
    stft_magnitude,
)
from vitascope.training.objectives.kl import kl_divergence
from vitascope.training.objectives.video_codec import psnr, reconstruction_terms
from vitascope.world.casting import SceneMix, draw_scene
from vitascope.world.scene import Scene, Subject


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.floats(-5, 5), st.floats(-6, 4))
def test_kl_is_that_of_two_gaussians(mean: float, log_variance: float) -> None:
    means, log_variances = torch.full((2, 3, 4), mean), torch.full((2, 3, 4), log_variance)
    expected = torch_kl(Normal(means, (0.5 * log_variances).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(means, log_variances), expected, rtol=1e-4, atol=1e-5)


def test_kl_of_the_standard_normal_is_zero_and_cells_are_averaged() -> None:
    assert kl_divergence(torch.zeros(4), torch.zeros(4)) == 0
    assert kl_divergence(torch.tensor([2.0, 0.0]), torch.zeros(2)) == 1.0  # (2^2 / 2 + 0) / 2


def test_reconstruction_terms_by_hand() -> None:
    frames = draw(2, 3, 4, 6, 5)
    same = reconstruction_terms(frames, frames)
    assert all(term == 0 for term in same.values())
    offset = reconstruction_terms(frames, frames + 0.5)
    torch.testing.assert_close(offset["absolute"], torch.tensor(0.5))
    torch.testing.assert_close(offset["squared"], torch.tensor(0.25))
    assert offset["edges"] < 1e-6  # a constant error has no edges and does not change
    assert offset["change"] < 1e-6
    rows = torch.arange(6.0).view(6, 1)
    ramp = reconstruction_terms(frames, frames + 0.1 * rows + 0.2 * torch.arange(4.0).view(4, 1, 1))
    torch.testing.assert_close(ramp["edges"], torch.tensor(0.1), rtol=1e-4, atol=0)
    torch.testing.assert_close(ramp["change"], torch.tensor(0.2), rtol=1e-4, atol=0)
    assert reconstruction_terms(frames[:, :, :1], frames[:, :, 1:2])["change"] == 0


def test_psnr_of_known_errors() -> None:
    errors = torch.tensor([4.0, 0.04, 0.0])
    torch.testing.assert_close(psnr(errors), torch.tensor([0.0, 20.0, 126.0206]))


def test_the_energy_score_is_zero_for_equal_and_the_distance_for_one_decoding() -> None:
    x, y, z = draw(3, 4, 5, 6).unbind(0)
    assert energy_score(torch.cat([x, x, x]), 4) == 0
    torch.testing.assert_close(energy_score(torch.cat([x, y, y]), 4), (x - y).abs().mean())
    torch.testing.assert_close(
        energy_score(torch.cat([x, y, z]), 4),
        ((x - y).abs().mean() + (x - z).abs().mean() - (y - z).abs().mean()) / 2,
    )


def test_the_energy_score_is_smallest_for_the_true_spread() -> None:
    """Of decoders that draw N(0, s^2) for data N(0, 1): s = 1 is best, where a plain distance would say s = 0."""
    x, y, z = draw(3, 40_000).unbind(0)
    scores = {s: float(energy_score(torch.stack([x, s * y, s * z]), 1)) for s in (0.0, 0.5, 1.0, 1.5)}
    assert min(scores, key=lambda s: scores[s]) == 1.0
    assert scores[1.0] == pytest.approx(pi**-0.5, rel=0.03)  # E|x - y| / 2 = 1 / sqrt(pi)
    assert scores[0.0] == pytest.approx((2 / pi) ** 0.5, rel=0.03)  # E|x|


def test_the_spectral_score_names_its_terms_and_is_zero_for_equal_sounds() -> None:
    score = SpectralScore(SpectralScales(windows=(64, 256), mels=((256, 16),)))
    sounds, other = 0.1 * draw(2, 1600), 0.1 * draw(2, 1600, seed=1)
    assert {name: float(term) for name, term in score(sounds, sounds, sounds).items()} == {
        "log_spectrum": 0.0, "spectrum": 0.0, "mel": 0.0, "waveform": 0.0,
    }  # fmt: skip
    terms = score(sounds, other, other)
    assert all(term > 0.01 for term in terms.values())
    louder = score(2 * sounds, 2 * other, 2 * other)  # relative to the loudness, but for a floor of 0.02
    torch.testing.assert_close(louder["waveform"], terms["waveform"] * (2 * 0.12 / 0.22), rtol=0.01, atol=0)
    assert not score.state_dict()  # the mel banks are not weights


def test_mel_windows_must_be_among_the_stft_windows() -> None:
    with pytest.raises(InputError, match=r"\[128\] must be among"):
        SpectralScales(windows=(64, 256), mels=((128, 16),))


@pytest.mark.parametrize("window", [64, 512])
def test_white_noise_has_its_deviation_in_every_bin(window: int) -> None:
    magnitude = stft_magnitude(0.3 * draw(4, 32_000), window)
    assert magnitude.shape == (4, 1 + 32_000 // (window // 4), window // 2 + 1)
    # root mean square over 4 x some hundred frames; the first and last bin of a real signal have the same power here
    rms = magnitude[:, 2:-2].square().mean((0, 1)).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.3), rtol=0.15, atol=0)


def test_a_tone_is_loudest_in_its_own_bin_and_band() -> None:
    seconds = torch.arange(16_000) / 16_000
    for hz in (500.0, 2000.0, 6000.0):
        tone = 0.5 * torch.sin(2 * pi * hz * seconds)[None]
        peak_bin = int(stft_magnitude(tone, 512)[0, 20].argmax())
        assert peak_bin == round(hz / (16_000 / 512))
        bank = mel_bank(80, 1024, 16_000)
        band = int(log_mel(tone, 16_000)[0, 20].argmax())
        assert bank[round(hz / (16_000 / 1024)), band] > 0


@given(st.integers(4, 80), st.sampled_from([128, 256, 1024]), st.sampled_from([8000, 16_000]))
def test_mel_bands_are_averages_of_rising_pitch(num_bands: int, window: int, rate_hz: int) -> None:
    bank = mel_bank(num_bands, window, rate_hz)
    assert bank.shape == (window // 2 + 1, num_bands)
    assert (bank >= 0).all()
    torch.testing.assert_close(bank.sum(0), torch.ones(num_bands))
    centres = (bank * torch.arange(window // 2 + 1)[:, None]).sum(0)
    assert (centres.diff() > -1e-3).all()


def test_silence_is_at_the_floor() -> None:
    level = log_mel(torch.zeros(1, 4000), 16_000)
    torch.testing.assert_close(level, torch.full_like(level, log(DEFAULT_SCALES.floor)), rtol=0, atol=0.01)


def test_answers_name_what_a_scene_shows() -> None:
    ball = Subject("red", "ball", motion="bounces")
    face = Subject("blue", "face", syllables=("ma", "o"))
    names = list(QUESTIONS)

    def told(scene: Scene) -> dict[str, str]:
        return {name: QUESTIONS[name][number] for name, number in zip(names, answers(scene), strict=True)}

    one = told(Scene((ball,), "gray"))
    assert (one["colour 1"], one["shape 1"], one["motion 1"]) == ("red", "ball", "bounces")
    assert {one["colour 2"], one["shape 2"], one["syllable 1"], one["ambience"]} == {"none"}
    two = told(Scene((ball, face), "gray", ambience="rain"))
    assert (two["colour 2"], two["shape 2"], two["ambience"]) == ("blue", "face", "rain")
    assert [two[f"syllable {n}"] for n in (1, 2, 3)] == ["ma", "o", "none"]


@given(st.integers(0, 2**30))
def test_every_scene_of_the_world_can_be_answered(seed: int) -> None:
    numbers = answers(draw_scene(seed, mix=SceneMix(two_subjects=0.5, face=0.4)))
    assert all(0 <= number < len(options) for number, options in zip(numbers, QUESTIONS.values(), strict=True))


def test_a_reader_scores_the_answers_there_are_and_reads_no_padding() -> None:
    torch.manual_seed(0)
    reader = AttributeReader(8)
    text = TextContext(draw(2, 5, 8), torch.tensor([[True] * 5, [True, True, False, False, False]]))
    scores = reader(text)
    for row, options in zip(scores[0], QUESTIONS.values(), strict=True):
        assert row[: len(options)].isfinite().all()
        assert (row[len(options) :] == float("-inf")).all()
    changed = TextContext(text.embeddings.clone(), text.mask)
    changed.embeddings[1, 2:] = 100.0
    torch.testing.assert_close(reader(changed), scores)


def test_knowing_nothing_costs_the_logarithm_of_the_number_of_answers() -> None:
    reader = AttributeReader(8).requires_grad_(False)
    torch.nn.init.zeros_(reader.score_head)
    scores = reader(TextContext(draw(3, 4, 8), torch.ones(3, 4, dtype=torch.bool)))
    right = torch.zeros(3, len(QUESTIONS), dtype=torch.long)
    loss, share = reading_loss(scores, right)
    expected = sum(log(len(options)) for options in QUESTIONS.values()) / len(QUESTIONS)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert share.shape == (len(QUESTIONS),)
    sure = torch.full_like(scores, -30.0).masked_fill(~reader.valid, float("-inf"))
    sure[:, :, 0] = 30.0
    loss, share = reading_loss(sure, right)
    assert loss < 1e-6
    assert (share == 1).all()
