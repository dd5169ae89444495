"""Denoisers and codecs on two processes against one: tokens shared, matrices divided, frames in strips.

Every case runs in the same two processes, and gives the relative error of what each of them found.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, CheckpointError, ShapeError
from vitascope.core.protocols import CAUSAL, Prepares
from vitascope.core.tracks import TextContext, Track
from vitascope.diffusion.guidance import Guidance, GuidedDenoiser
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.models.codecs.causal_video.config import CausalVideoConfig, Level
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.models.codecs.decoding import Decoding, check_decoding, decode_frames
from vitascope.models.codecs.ltx.config import DecoderStage, EncoderStage, LTXCodecConfig
from vitascope.models.codecs.ltx.model import LTXCodec
from vitascope.models.codecs.mochi.config import MochiCodecConfig
from vitascope.models.codecs.mochi.model import MochiCodec
from vitascope.models.codecs.parallel import SharedCodec, share_codec
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.models.codecs.wan.model import WanCodec
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.model import FactorisedDenoiser
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.mochi.model import MochiDenoiser
from vitascope.models.parallel import SharedDenoiser, divide_matrices
from vitascope.models.parts import Part
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.model import WanDenoiser
from vitascope.parallel.launch import joined
from vitascope.parallel.ranks import Ranks
from vitascope.parallel.tokens import SHARINGS, Ring, Ulysses
from vitascope.weights.keys import Rename
from vitascope.weights.sources import MemorySource

COUNT = 2
TOLERANCE = 1e-5
"""Relative; the same fp32 sums in another order."""
WAN = WanConfig(width=48, depth=2, num_heads=4, hidden=80, text_width=20, in_channels=8, out_channels=8)
LTX = LTXConfig(width=48, depth=2, num_heads=4, in_channels=8, out_channels=8, text_width=20)
MOCHI = MochiConfig(width=48, stream_width=24, depth=3, num_heads=4, video_channels=8, text_width=16, pool_heads=4)
POCKET = FactorisedConfig(
    width=32, depth=2, num_heads=4, audio_width=16, audio_heads=2, text_width=12, video_channels=8, audio_channels=6,
    patch=(1, 2, 2), audio_patch=2, base_grid=(2, 2),
)  # fmt: skip
MODELS: dict[type, type[nn.Module]] = {
    WanConfig: WanDenoiser,
    LTXConfig: LTXDenoiser,
    MochiConfig: MochiDenoiser,
    FactorisedConfig: FactorisedDenoiser,
    WanCodecConfig: WanCodec,
    LTXCodecConfig: LTXCodec,
    MochiCodecConfig: MochiCodec,
    CausalVideoConfig: CausalVideoCodec,
}
Case = Callable[[Ranks], float]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def differ(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    assert b.std() > 0.01
    return float((a - b).norm() / b.norm())


def model_of(config: Any, std: float = 0.1) -> Any:
    model, make = MODELS[type(config)](config), torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and parameter.ndim == 1 else 0.0, std, generator=make)
    return model.eval().requires_grad_(False)


def inputs(config: Any, latents: tuple[int, int, int], levels: str = "clip", num_clips: int = 2) -> Any:
    """Tracks and a text whose clips have 7 and 3 words."""
    grid = {"clip": (1, 1, 1), "frame": (latents[0], 1, 1), "cell": latents}[levels]
    noise = torch.rand((num_clips, 1, *grid), generator=torch.Generator().manual_seed(1))
    beside = getattr(config, "condition_channels", 0)
    condition = draw(num_clips, beside, *latents, seed=2) if beside else None
    tracks = {"video": Track(draw(num_clips, 8, *latents), noise, torch.arange(latents[0]) / 4, condition)}
    if isinstance(config, FactorisedConfig):
        tracks["audio"] = Track(draw(num_clips, 6, 8), torch.ones(1, 1, 1), torch.arange(8) / 8)
    words, mask = draw(num_clips, 7, config.text_width, seed=4), torch.arange(7) < torch.tensor([[7], [3]])[:num_clips]
    image_width = getattr(config, "image_width", 0)
    image = draw(num_clips, 5, image_width, seed=5) if image_width else None
    return tracks, TextContext(words, mask, image)


def shared(kind: str, model: Any, ranks: Ranks) -> Any:
    if kind != "tensor":
        return SharedDenoiser(model, SHARINGS[kind](ranks))
    divided = deepcopy(model)
    divide_matrices(divided, ranks)
    assert sum(p.numel() for p in divided.parameters()) < 0.85 * sum(p.numel() for p in model.parameters())
    return divided


def denoiser(kind: str, config: Any, latents: tuple[int, int, int], levels: str = "clip", num_clips: int = 2) -> Case:
    def case(ranks: Ranks) -> float:
        model = model_of(config)
        tracks, text = inputs(config, latents, levels, num_clips)
        expected, divided = model(tracks, text), shared(kind, model, ranks)
        assert divided.capabilities == model.capabilities
        found = divided(tracks, text)
        for name, values in found.items():
            mine = ranks.gather(values.flatten().unsqueeze(0), [1] * ranks.size, 0)
            assert torch.equal(mine[0], mine[1]), f"{name} differs between processes"
        return max(differ(found[name], expected[name]) for name in expected)

    return case


def guided(kind: str, config: Any, latents: tuple[int, int, int]) -> Case:
    """Two clips with prepared texts of unequal lengths, both branches in one call."""

    def case(ranks: Ranks) -> float:
        model = model_of(config)
        tracks, cond = inputs(config, latents)
        uncond = TextContext(draw(2, 4, config.text_width, seed=6), torch.ones(2, 4, dtype=torch.bool), cond.image)
        found = []
        models: list[Any] = [model, shared(kind, model, ranks)]
        assert all(isinstance(one, Prepares) for one in models)
        for one in models:
            told, untold = (
                replace(one.prepare(text), embeddings=torch.zeros_like(text.embeddings)) for text in (cond, uncond)
            )
            found.append(GuidedDenoiser(one, RectifiedFlow(), told, untold, Guidance(4.0))(tracks)["video"])
        return differ(found[1], found[0])

    return case


def codec(config: Any, latents: tuple[int, int, int], num_clips: int = 1) -> Case:
    def case(ranks: Ranks) -> float:
        one = model_of(config, 0.2)
        values = draw(num_clips, config.latent_channels, *latents)
        many = SharedCodec(one, ranks)
        expected = one.decode(values)
        assert (many.strides, many.latent_channels) == (one.strides, one.latent_channels)
        assert torch.equal(many.encode(expected), one.encode(expected))
        found = many.decode(values)
        if ranks.is_first:  # alone, as a preview is made
            assert torch.equal(many.preview(values), getattr(one, "preview", one.decode)(values))
        return differ(found, expected)

    return case


def told(ranks: Ranks) -> float:
    """A conditioned codec, told how noisy its latents are by what decodes clips; others refuse it."""
    one, plain = (model_of(CODECS[name][0], 0.2) for name in ("ltx, noise", "wan"))
    values, how = draw(1, 5, 3, 4, 2), Decoding(timestep=0.6, noise_scale=0.4)
    many = share_codec(one, ranks)
    expected, usual = (decode_frames(one, values, way).float() for way in (how, Decoding()))
    assert differ(expected, usual) > 0.01
    with pytest.raises(CapabilityError, match="not conditioned on noise"):
        check_decoding(share_codec(plain, ranks), how)
    assert (decode_frames(many, values, how).float() - expected).abs().max() <= 1  # rounding to 8 bits
    return differ(many.decode(values, timestep=0.6, noise_scale=0.4), one.decode(values, timestep=0.6, noise_scale=0.4))


def refusals(ranks: Ranks) -> float:
    """Too few rows; too few tokens, from the wrapper's own call; what the model itself refuses passes through."""
    wrong = 3
    tracks, text = inputs(LTX, (1, 1, 1))
    decoder = SharedCodec(model_of(CODECS["wan"][0]), ranks)
    for act, message in (
        (
            lambda: decoder.decode(draw(1, 4, 1, 1, 5)),
            "1 rows of latents cannot be shared by 2 processes; use at most 1",
        ),
        (lambda: SharedDenoiser(model_of(LTX), Ring(ranks))(tracks, text), "1 tokens cannot be shared by 2 processes"),
        (lambda: SharedDenoiser(model_of(LTX), Ring(ranks))(tracks, text, strategy=CAUSAL), "not causal"),
    ):
        try:
            act()
        except (ShapeError, CapabilityError) as error:
            wrong -= message in str(error)
    return float(wrong)


STAGES = (DecoderStage(16, 1), DecoderStage(8, 1, "residual", 2, True), DecoderStage(4, 2, "residual", 2, True))
CODECS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "wan": (WanCodecConfig(8, blocks=1, latent_channels=4, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4), (3, 5, 3)),
    "wan, a row each": (
        WanCodecConfig(4, (1, 2), (True,), 1, 4, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4),
        (2, 2, 4),
    ),
    "pocket": (
        CausalVideoConfig(6, (Level(8, 1, 1), Level(16, 1, 1, (2, 2, 2)), Level(16, 1, 1, (2, 1, 1))), 2),
        (3, 3, 4),
    ),
    "ltx, noise": (
        LTXCodecConfig((EncoderStage(4, 1, "conv"), EncoderStage(6, 1, "conv"), EncoderStage(6, 1)), STAGES,
                       latent_channels=5, patch_px=2, timestep_conditioning=True),
        (4, 3, 2),
    ),
    "mochi": (
        MochiCodecConfig((32, 32, 64, 64), (32, 64, 32, 64), blocks=(1,) * 5, latent_channels=4,
                         latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4),
        (2, 3, 2),
    ),
}  # fmt: skip
IMAGE = replace(WAN, in_channels=13, image_width=24)
CASES: dict[str, Case] = {
    **{
        f"{kind}, {name}": denoiser(kind, *arguments)
        for kind in ("ulysses", "ring", "tensor")
        for name, arguments in {
            "wan": (WAN, (3, 4, 6)),
            "wan, uneven": (WAN, (3, 2, 6), "clip", 1),
            "wan, image": (IMAGE, (1, 6, 6)),
            "wan, level a frame": (replace(WAN, noise="frame"), (3, 2, 6), "frame"),
            "ltx, uneven, level a cell": (LTX, (3, 3, 5), "cell"),
            "ltx, width that six does not divide": (replace(LTX, width=64), (2, 2, 3)),
            "mochi": (MOCHI, (2, 4, 4)),
            "mochi, uneven": (MOCHI, (1, 6, 6), "clip", 2),
            "mochi, text sees text": (replace(MOCHI, text_sees="text"), (1, 6, 6)),
        }.items()
    },
    "ring, wan, three heads": denoiser("ring", replace(WAN, num_heads=3), (3, 2, 6)),
    "ring, mochi, three heads": denoiser("ring", replace(MOCHI, num_heads=3), (1, 6, 6)),
    "tensor, wan, three heads and 33 units": denoiser("tensor", replace(WAN, num_heads=3, hidden=33), (3, 2, 6)),
    "tensor, ltx, three heads": denoiser("tensor", replace(LTX, num_heads=3), (3, 2, 6)),
    "tensor, mochi, three heads": denoiser("tensor", replace(MOCHI, num_heads=3), (1, 6, 6)),
    "tensor, pocket": denoiser("tensor", POCKET, (3, 4, 4), "cell"),
    "tensor, pocket, one key head": denoiser(
        "tensor", replace(POCKET, attention="multi_query", feed_forward="geglu", positions="rotary"), (3, 4, 4)
    ),
    **{
        f"{kind}, guided {name}": guided(kind, config, (1, 6, 6))
        for kind in ("ulysses", "ring", "tensor")
        for name, config in {"wan": IMAGE, "ltx": LTX, "mochi": replace(MOCHI, text_sees="text")}.items()
    },
    **{f"codec, {name}": codec(*arguments) for name, arguments in CODECS.items()},
    "codec, wan, two clips": codec(CODECS["wan"][0], (1, 4, 2), 2),
    "codec, wan, no strides of time": codec(replace(CODECS["wan"][0], halve_time=(False,) * 3), (2, 3, 2)),
    "codec, ltx, causal": codec(replace(CODECS["ltx, noise"][0], decoder_causal=True), (3, 5, 2), 2),
    "codec, ltx, told of its noise": told,
    "refusals": refusals,
}


def work(result: Path) -> None:
    with joined(os.environ, "cpu", patience_s=240.0) as ranks:
        found = {name: case(ranks) for name, case in CASES.items()}
    result.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(in_processes: Callable[..., list[Any]]) -> list[dict[str, float]]:
    return in_processes(__file__, COUNT)


@pytest.mark.parametrize("name", CASES)
def test_every_process_has_what_one_alone_has(name: str, found: list[dict[str, float]]) -> None:
    assert all(result[name] < TOLERANCE for result in found), [result[name] for result in found]


def ranks_of(rank: int, size: int) -> Ranks:
    """Without processes: for what needs no exchange."""
    return Ranks(rank, size, torch.device("cpu"))


def test_what_cannot_share_tokens_is_refused() -> None:
    with pytest.raises(
        ShapeError, match="4 heads cannot be exchanged between 3 processes; valid numbers of processes: 1"
    ):
        SharedDenoiser(model_of(WAN), Ulysses(ranks_of(0, 3)))
    SharedDenoiser(model_of(WAN), Ring(ranks_of(0, 3)))
    with pytest.raises(CapabilityError, match="FactorisedDenoiser does not share tokens between processes; valid: Wan"):
        SharedDenoiser(model_of(POCKET), Ring(ranks_of(0, 2)))


def test_what_cannot_decode_in_strips_is_refused() -> None:
    nothing: Any = nn.Identity()
    with pytest.raises(CapabilityError, match="Identity does not decode on several processes; valid: WanCodec, Causal"):
        SharedCodec(nothing, ranks_of(0, 2))


@pytest.mark.parametrize("config", [WAN, LTX, MOCHI, replace(POCKET, audio_heads=4), replace(WAN, hidden=33)])
def test_the_parts_of_all_processes_are_the_whole(config: Any) -> None:
    """Every entry of a divided weight is with one process (those of an odd head or unit with the first)."""
    whole = model_of(config)
    models = [deepcopy(whole) for _ in range(3)]
    cuts = [divide_matrices(model, ranks_of(rank, 3)) for rank, model in enumerate(models)]
    assert len(cuts[0]) > 5 * config.depth
    for name, weight in whole.state_dict().items():
        parts = [model.state_dict()[name] for model in models]
        if name not in cuts[0]:
            assert all(torch.equal(part, weight) for part in parts)
            continue
        seen = torch.zeros(weight.shape[cuts[0][name].axis], dtype=torch.int64)
        for cut, part in zip(cuts, parts, strict=True):
            assert torch.equal(cut[name].of(weight), part)
            for kept in cut[name].ranges:
                seen[kept] += 1
        assert bool((seen == 1).all()), name


def test_a_process_loads_its_part_and_no_more() -> None:
    whole, ranks = model_of(WAN), ranks_of(1, 2)
    source = MemorySource({f"theirs.{name}": weight for name, weight in whole.state_dict().items()})
    table = tuple(Rename(f"theirs.{name}", name) for name in whole.state_dict())
    part = Part("wan", "original", WAN, table, source).load(ranks=ranks)
    divide_matrices(whole, ranks)
    for name, weight in whole.state_dict().items():
        assert torch.equal(part.state_dict()[name], weight), name


def test_weights_of_another_size_are_refused_before_they_are_cut() -> None:
    other = model_of(replace(WAN, hidden=82)).state_dict()
    table = tuple(Rename(f"theirs.{name}", name) for name in other)
    source = MemorySource({f"theirs.{name}": weight for name, weight in other.items()})
    with pytest.raises(CheckpointError, match=r"a weight \(82, 48\) cannot be divided: axis 0 has 80"):
        Part("wan", "original", WAN, table, source).load(ranks=ranks_of(0, 2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WAN, "4 heads cannot be shared by 5 processes; use at most 4"),
        (replace(WAN, num_heads=6, hidden=4), "4 hidden units cannot be shared by 5 processes; use at most 4"),
        (replace(POCKET, width=40, num_heads=5), "2 heads cannot be shared by 5 processes; use at most 2"),
    ],
)
def test_more_processes_than_parts(config: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        divide_matrices(model_of(config), ranks_of(0, 5))


def test_what_is_divided_already_is_refused() -> None:
    model = model_of(WAN)
    divide_matrices(model, ranks_of(0, 2))
    with pytest.raises(CapabilityError, match=r"blocks.0.attention.out is a SummedLinear: divide matrices while they"):
        divide_matrices(model, ranks_of(0, 2))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
