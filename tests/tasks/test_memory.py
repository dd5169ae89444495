"""The choice of a plan, on costs that are made up: fastest first, within the limit, and clear where nothing fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from vitascope.core.errors import InputError
from vitascope.core.memory import parse_bytes
from vitascope.models.codecs.decoding import Decoding
from vitascope.models.offload.offloaded import WHOLE, Layers, WeightBytes
from vitascope.nn.storage import Storage
from vitascope.nn.tiling import Tiling
from vitascope.tasks.memory import MemoryPlan, MemoryUse, StagePeak, choose_plan

MB = 10**6
STORED: dict[Storage, float] = {"bf16": 0.5, "fp8": 0.25}


@dataclass
class Made:
    """A denoiser of 20 layers of 50 MB with 100 MB beside them, a codec of 300 MB."""

    text_mb: int = 400
    text_layer_mb: int = 0
    layer_mb: int = 50
    enlarger_mb: int = 0
    exact_storages: Sequence[Storage] = ()
    decodings: Sequence[Decoding] = (
        Decoding(), Decoding(1), Decoding(1, Tiling(32, 12)), Decoding(1, Tiling(16, 6))
    )  # fmt: skip
    asked: list[str] = field(default_factory=list)

    @property
    def denoiser(self) -> WeightBytes:
        return WeightBytes(100 * MB, (self.layer_mb * MB,) * 20)

    others = 300 * MB

    def layers(self, layers: Layers) -> int:
        here = 20 if layers.resident is None else min(20, layers.resident)
        streamed = 20 - here
        each = self.layer_mb * MB
        total = 100 * MB + here * each
        if streamed:
            total += min(streamed, layers.group) * each * (1 + (layers.prefetch and streamed > layers.group))
        if layers.storage != "as_is":
            total += round(streamed * each * STORED[layers.storage])
        return total

    def text_layers(self) -> Sequence[int]:
        return (self.text_layer_mb * MB,) * 8 if self.text_layer_mb else ()

    def text(self, layers: Layers = WHOLE) -> StagePeak | None:
        self.asked.append("text")
        weights = self.text_mb
        if layers != WHOLE:
            weights = layers.group * self.text_layer_mb * (1 + layers.prefetch)
        return StagePeak("text", weights * MB, 20 * MB)

    def encode(self) -> StagePeak | None:
        return None

    def denoise(self, together: bool) -> int:
        self.asked.append("denoise")
        return (200 if together else 120) * MB

    def enlarge(self) -> StagePeak | None:
        return StagePeak("enlarge", self.enlarger_mb * MB, 50 * MB) if self.enlarger_mb else None

    def decode(self, how: Decoding) -> StagePeak:
        self.asked.append("decode")
        working = 600 if how.chunk is None else 300
        if how.tiling is not None:
            working = 8 * how.tiling.tile
        return StagePeak("decode", 300 * MB, working * MB)


def plan(limit_mb: int, costs: Made | None = None, lossy: bool = False) -> MemoryPlan:
    return choose_plan(costs or Made(), limit_mb * MB, lossy=lossy)


def least_mb(costs: Made, lossy: bool = False) -> int:
    with pytest.raises(InputError) as caught:
        choose_plan(costs, MB, lossy=lossy)
    found = re.search(r"give ([\d.]+ [MG]B)", str(caught.value))
    assert found is not None
    assert "\n" not in str(caught.value)
    return parse_bytes(found[1]) // MB


def speed(plan: MemoryPlan) -> tuple[float, ...]:
    """Higher is faster, first things first, for plans that are exact."""
    layers = plan.denoising.layers
    resident = 20 if layers.resident is None else layers.resident
    tile = 99 if plan.decoding.tiling is None else plan.decoding.tiling.tile
    return plan.together, resident, layers.prefetch, tile, plan.decoding.chunk is None


def test_every_limit_is_kept_and_more_memory_is_never_slower() -> None:
    least = least_mb(Made())
    plans = [plan(limit) for limit in range(least, 2600, 15)]
    for found in plans:
        assert found.peak <= found.limit
        assert found.exact == (found.decoding.tiling is None)
    for less, more in pairwise(plans):
        assert more.together >= less.together
        if more.together == less.together:
            assert speed(more)[1] >= speed(less)[1] or speed(more)[2] > speed(less)[2]
            assert speed(more)[3:] >= speed(less)[3:]
    assert plans[-1].together
    assert plans[-1].decoding == Decoding()
    assert plans[0].denoising.layers.resident == 0
    kinds = {(p.together, p.denoising.layers == WHOLE, p.denoising.branches_together, p.decoding) for p in plans}
    assert len(kinds) >= 5


def test_the_smallest_limit_that_is_named_is_the_smallest() -> None:
    for costs in (Made(), Made(text_mb=900), Made(layer_mb=300)):
        least = least_mb(costs)
        assert plan(least, costs).peak <= least * MB
        with pytest.raises(InputError, match="is too little"):
            plan(least - 2, costs)


@pytest.mark.parametrize(
    ("costs", "stage", "advice"),
    [
        (Made(text_mb=900), "text", "bf16 in place of fp32"),
        (Made(layer_mb=300), "denoise", "guidance scale of 1"),
        (Made(text_mb=0), "decode", "fewer frames"),
    ],
)
def test_what_is_too_large_and_how_it_becomes_smaller_is_said(costs: Made, stage: str, advice: str) -> None:
    with pytest.raises(InputError, match=f"stage '{stage}' needs .* at least .*{advice}"):
        plan(100, costs)


def test_branches_one_by_one_come_before_layers_that_come_and_go() -> None:
    found = plan(1240)
    assert not found.together
    assert found.denoising.layers == WHOLE
    assert not found.denoising.branches_together
    # layers that come and go take all branches at once: each costs a reading
    fewer = plan(1100)
    assert fewer.denoising.branches_together
    assert 0 < (fewer.denoising.layers.resident or 0) < 20
    assert fewer.denoising.layers.prefetch
    resident = fewer.denoising.layers.resident
    assert resident is not None
    one_more = Layers(resident + 1, fewer.denoising.layers.group)
    assert Made().layers(one_more) + 200 * MB > 1100 * MB


def test_fewer_bits_are_taken_where_they_lose_nothing_or_are_allowed() -> None:
    assert plan(900).denoising.layers.storage == "as_is"
    exact = plan(900, Made(exact_storages=("bf16",)))
    assert exact.denoising.layers == Layers(0, prefetch=False, storage="bf16")
    assert exact.exact
    lossy = plan(700, lossy=True)
    assert lossy.denoising.layers.storage == "fp8"
    assert not lossy.exact
    assert plan(1400, lossy=True).exact


def test_small_layers_come_in_groups() -> None:
    costs = Made(layer_mb=10, text_mb=0)
    found = plan(470, costs)
    assert found.denoising.layers == WHOLE
    costs = Made(layer_mb=10, text_mb=0, decodings=[Decoding(1, Tiling(1, 0))])
    found = plan(410, costs)
    assert found.denoising.layers.group == 4


def test_what_is_slow_to_find_out_is_asked_for_when_it_is_needed() -> None:
    costs = Made()
    plan(10_000, costs)
    assert costs.asked == ["text", "denoise", "decode"]


def test_a_text_encoder_comes_layer_by_layer_only_where_the_whole_does_not_fit() -> None:
    large = {"text_mb": 4000, "text_layer_mb": 500, "decodings": [Decoding(1, Tiling(1, 0))]}
    assert plan(4020, Made(**large)).text == WHOLE
    for limit, layers in ((4019, Layers(0)), (1020, Layers(0)), (1019, Layers(0, prefetch=False))):
        found = plan(limit, Made(**large))
        assert found.text == layers
        assert found.peak <= limit * MB
    assert "layers of the text encoder come 1 at a time, when they are needed" in found.choices()
    with pytest.raises(InputError, match=r"stage 'text' needs 520 MB at least \(500 MB of weights\)"):
        plan(519, Made(**large))
    # of small layers several come at a time
    assert plan(310, Made(text_mb=4000, text_layer_mb=4, layer_mb=1, decodings=large["decodings"])).text.group == 8
    with pytest.raises(InputError, match=r"stage 'text' needs 4\.02 GB"):
        plan(1020, Made(text_mb=4000))


def test_an_up_sampler_stands_between_the_passes_and_is_counted_wherever_parts_are() -> None:
    costs = Made(enlarger_mb=500)
    together = plan(3000, costs)
    assert together.together
    enlarge = together.stages[-2]
    assert (enlarge.name, enlarge.weights, enlarge.working) == ("enlarge", 1400 * MB, 50 * MB)
    apart = plan(900, costs)
    assert [stage.name for stage in apart.stages] == ["text", "denoise", "enlarge", "decode"]
    assert apart.stages[2].total == 550 * MB
    with pytest.raises(InputError, match=r"the stage 'enlarge' needs 550 MB .*give 550 MB, or a smaller size"):
        plan(540, costs)


def test_a_plan_is_a_short_table() -> None:
    found = plan(1000)
    lines = MemoryUse(found, {"denoise": 800 * MB}).lines()
    assert len(lines) == 2 + len(found.stages)
    assert lines[0].startswith("memory 1.00 GB: each part is there while it works, ")
    assert "of 20 layers come 1 at a time, the next ones ahead of time" in lines[0]
    assert lines[1].split() == ["stage", "weights", "working", "predicted", "measured"]
    assert lines[3].split()[-2:] == ["800", "MB"]
    assert lines[4].split()[-1] == "-"
    assert len(found.lines()[1].split()) == 4
    for shown, said in (
        (plan(5000), "all parts stay, denoiser whole"),
        (plan(1240), "branches of guidance one by one"),
        (plan(700, lossy=True), "20 of 20 layers kept in fp8"),
        (plan(580), "in tiles of 32 latents"),
    ):
        assert said in shown.choices()
