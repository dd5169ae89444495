"""Fitting a clip into a limit of memory: what may be chosen, what each choice needs, and the fastest that fits.

A clip is made in stages (text, encode, denoise, enlarge, decode; some clips without some of them). With all parts of
the pipeline together on the device every stage stands on the weights of all; else a stage stands on its own part alone,
and parts take turns. What is chosen for one stage does not depend on the others, so each takes the first of its
choices, in order of speed, that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from vitascope.core.errors import InputError
from vitascope.core.memory import format_bytes
from vitascope.models.codecs.decoding import Decoding
from vitascope.models.offload.offloaded import WHOLE, Layers, WeightBytes
from vitascope.nn.storage import Storage

T = TypeVar("T")
SMALL_GROUP_BYTES = 32 << 20
"""Layers that are smaller come several at a time: each reading has a cost of its own."""
ADVICE = {
    "text": "bf16 in place of fp32, or a guidance scale of 1",
    "encode": "a smaller size or fewer frames",
    "denoise": "a smaller size, fewer frames, or a guidance scale of 1",
    "enlarge": "a smaller size or fewer frames",
    "decode": "a smaller size or fewer frames",
}
"""What makes a stage smaller."""


@dataclass(frozen=True)
class StagePeak:
    """What a stage holds at most, in bytes: weights, and what is worked out with them."""

    name: str
    weights: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.working


@dataclass(frozen=True)
class Denoising:
    """How the denoiser runs: where its layers are, and whether the branches of guidance share one call."""

    layers: Layers = WHOLE
    branches_together: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen to keep `limit` bytes, and the peak of each stage that is expected of it.

    together: all parts of the pipeline stay on the device; else each is there while it works. text: where the layers of
    the text encoder are while it reads.
    """

    limit: int
    together: bool
    denoising: Denoising
    decoding: Decoding
    num_layers: int
    stages: tuple[StagePeak, ...]
    text: Layers = WHOLE

    @property
    def peak(self) -> int:
        """The highest of all stages, in bytes."""
        return max(stage.total for stage in self.stages)

    @property
    def exact(self) -> bool:
        """Whether the clip is the one that would be made without a limit, but for the order of sums."""
        return self.denoising.layers.storage != "fp8" and self.decoding.tiling is None

    def lines(self, measured: dict[str, int] | None = None) -> list[str]:
        """A few lines for people: what was chosen, and a table of the stages, with what was measured beside."""
        head = f"{'stage':<8} {'weights':>10} {'working':>10} {'predicted':>10}"
        rows = [
            f"{s.name:<8} {format_bytes(s.weights):>10} {format_bytes(s.working):>10} {format_bytes(s.total):>10}"
            for s in self.stages
        ]
        if measured is not None:
            head += f" {'measured':>10}"
            found = [format_bytes(measured[s.name]) if s.name in measured else "-" for s in self.stages]
            rows = [f"{row} {value:>10}" for row, value in zip(rows, found, strict=True)]
        return [f"memory {format_bytes(self.limit)}: {self.choices()}", head, *rows]

    def choices(self) -> str:
        """What was chosen, in one line."""
        said = ["all parts stay" if self.together else "each part is there while it works"]
        if self.text != WHOLE:
            said.append(f"layers of the text encoder come {_said_of_coming(self.text)}")
        said.append(_said_of_layers(self.denoising.layers, self.num_layers))
        if not self.denoising.branches_together:
            said.append("branches of guidance one by one")
        if self.decoding.chunk is not None:
            chunk = self.decoding.chunk
            said.append(f"decoded {chunk} latent frame{'s' * (chunk != 1)} at a time" if chunk else "decoded at once")
        if self.decoding.tiling is not None:
            said.append(f"in tiles of {self.decoding.tiling.tile} latents")
        return ", ".join(said)


@dataclass(frozen=True)
class MemoryUse:
    """What was planned for a clip, and the peak of each stage that was measured, in bytes."""

    plan: MemoryPlan
    measured: Mapping[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A table for people."""
        return self.plan.lines(dict(self.measured))


class Costs(Protocol):
    """What a clip takes, in bytes; figures that are long to find are asked for only when they are needed."""

    @property
    def denoiser(self) -> WeightBytes: ...
    @property
    def others(self) -> int: ...
    @property
    def decodings(self) -> Sequence[Decoding]: ...
    @property
    def exact_storages(self) -> Sequence[Storage]: ...
    def layers(self, layers: Layers) -> int: ...
    def text_layers(self) -> Sequence[int]: ...
    def text(self, layers: Layers = WHOLE) -> StagePeak | None: ...
    def encode(self) -> StagePeak | None: ...
    def denoise(self, together: bool) -> int: ...
    def enlarge(self) -> StagePeak | None: ...
    def decode(self, how: Decoding) -> StagePeak: ...


def choose_plan(costs: Costs, limit: int, *, taken: int = 0, lossy: bool = False) -> MemoryPlan:
    """The fastest plan whose every stage keeps `limit` bytes.

    taken: bytes that are taken before, which messages count with both the limit and the need. lossy: the denoiser's
    layers may be kept in fp8, which changes the clip. Raises InputError, naming the smallest limit that would do and
    what to reduce, where none fits.
    """
    together = _all_together(costs, limit)
    if together is not None:
        return together
    read, text = choose_text(costs, limit)
    stages = [stage for stage in (text, costs.encode()) if stage is not None]
    denoising, denoise = _first(limit, _denoise_choices(costs, limit, lossy))
    decoding, decode = _first(limit, _decode_choices(costs))
    enlarge = costs.enlarge()
    stages += [denoise, *([] if enlarge is None else [enlarge]), decode]
    check_fits(max(stages, key=lambda stage: stage.total), limit, taken)
    return MemoryPlan(limit, False, denoising, decoding, len(costs.denoiser.layers), tuple(stages), read)


def choose_text(costs: Costs, limit: int) -> tuple[Layers, StagePeak | None]:
    """How the text encoder is read, and its stage, if there is one: whole, else layer by layer, if it can be."""
    whole = costs.text()
    if whole is None or whole.total <= limit:
        return WHOLE, whole
    layers = costs.text_layers()
    # all prompts go through a layer together, so that one which stays would be read no less often
    ways = dict.fromkeys([(_group(layers), True), (1, True), (1, False)]) if layers else {}
    choices = [WHOLE, *(Layers(0, group, prefetch) for group, prefetch in ways)]
    return _first(limit, ((way, partial(_text, costs, way)) for way in choices))


def check_fits(stage: StagePeak, limit: int, taken: int = 0) -> None:
    """Raise InputError, naming the smallest limit that would do, for a stage that does not keep `limit`."""
    if stage.total <= limit:
        return
    least = format_bytes(_rounded_up(stage.total + taken))
    beside = f", {format_bytes(taken)} taken before" if taken else ""
    raise InputError(
        f"memory {format_bytes(limit + taken)} is too little: the stage {stage.name!r} needs {least} at least "
        f"({format_bytes(stage.weights)} of weights{beside}); give {least}, or {ADVICE[stage.name]}"
    )


def _text(costs: Costs, layers: Layers) -> StagePeak:
    stage = costs.text(layers)
    assert stage is not None
    return stage


def _all_together(costs: Costs, limit: int) -> MemoryPlan | None:
    """The plan in which nothing moves, if it fits; frames are decoded whole there."""
    weights = costs.denoiser.total + costs.others
    text, encode, enlarge = costs.text(), costs.encode(), costs.enlarge()
    if weights >= limit or (text is not None and text.weights + weights > limit):
        return None
    stages = []
    if text is not None:
        stages.append(StagePeak("text", weights + text.weights, text.working))
    if encode is not None:
        stages.append(StagePeak("encode", weights, encode.working))
    for branches in (True, False):
        denoise = StagePeak("denoise", weights, costs.denoise(branches))
        if denoise.total <= limit:
            break
    else:
        return None
    stages.append(denoise)
    if enlarge is not None:
        stages.append(StagePeak("enlarge", weights, enlarge.working))
    for decoding in costs.decodings:
        decode = StagePeak("decode", weights, costs.decode(decoding).working) if decoding.tiling is None else None
        if decode is not None and decode.total <= limit and all(stage.total <= limit for stage in stages):
            whole = Denoising(WHOLE, branches)
            return MemoryPlan(limit, True, whole, decoding, len(costs.denoiser.layers), (*stages, decode))
    return None


def _denoise_choices(costs: Costs, limit: int, lossy: bool) -> Iterator[tuple[Denoising, Callable[[], StagePeak]]]:
    """From the fastest to the smallest."""
    storages: list[Storage] = [*costs.exact_storages, *(["fp8"] if lossy else [])]
    kept = [WHOLE, *(Layers(0, prefetch=False, storage=storage) for storage in storages)]
    count = len(costs.denoiser.layers)
    for layers in kept if count else [WHOLE]:
        for together in (True, False):
            yield _denoising(costs, layers, together)
    if not count:
        return
    group = _group(costs.denoiser.layers)
    for together in (True, False):
        for size, prefetch in dict.fromkeys([(group, True), (1, True), (1, False)]):
            room = limit - costs.denoise(together)
            resident = _most_resident(costs, size, prefetch, room)
            yield _denoising(costs, Layers(resident, size, prefetch), together)


def _group(layers: Sequence[int]) -> int:
    """How many layers, by their bytes, come at a time where there is room."""
    return max(1, min(len(layers), -(-SMALL_GROUP_BYTES // max(1, *layers))))


def _most_resident(costs: Costs, group: int, prefetch: bool, room: int) -> int:
    """As many layers as stay within `room` beside those that come and go; 0 where not even those fit."""
    low, high = 0, max(0, len(costs.denoiser.layers) - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if costs.layers(Layers(middle, group, prefetch)) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _denoising(costs: Costs, layers: Layers, together: bool) -> tuple[Denoising, Callable[[], StagePeak]]:
    return (
        Denoising(layers, together),
        lambda: StagePeak("denoise", costs.layers(layers), costs.denoise(together)),
    )


def _decode_choices(costs: Costs) -> Iterator[tuple[Decoding, Callable[[], StagePeak]]]:
    for decoding in costs.decodings:
        yield decoding, lambda decoding=decoding: costs.decode(decoding)


def _first(limit: int, choices: Iterable[tuple[T, Callable[[], StagePeak]]]) -> tuple[T, StagePeak]:
    """The first choice that fits, or the smallest of all where none does."""
    best: tuple[T, StagePeak] | None = None
    for choice, find in choices:
        peak = find()
        if peak.total <= limit:
            return choice, peak
        if best is None or peak.total < best[1].total:
            best = choice, peak
    assert best is not None
    return best


def _said_of_layers(layers: Layers, count: int) -> str:
    streamed = 0 if layers.resident is None else max(0, count - layers.resident)
    if not streamed:
        return "denoiser whole"
    if layers.storage != "as_is":
        return f"{streamed} of {count} layers kept in {layers.storage}"
    return f"{streamed} of {count} layers come {_said_of_coming(layers)}"


def _said_of_coming(layers: Layers) -> str:
    ahead = "the next ones ahead of time" if layers.prefetch else "when they are needed"
    return f"{layers.group} at a time, {ahead}"


def _rounded_up(amount: int) -> int:
    """To what `format_bytes` can say without saying less."""
    step = 10**7 if amount >= 10**9 else 10**6
    return -(-amount // step) * step
