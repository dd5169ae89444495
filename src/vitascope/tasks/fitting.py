"""Pipelines whose parts come to the device when they work, in the way that a limit of memory asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitascope.core.errors import InputError
from vitascope.core.freed_memory import release_freed_memory
from vitascope.core.memory import PeakMemory, available_bytes, format_bytes, held_bytes
from vitascope.core.protocols import ImageEncoder, KeepsTexts, TextEncoder
from vitascope.models.lora import updates_of
from vitascope.models.offload.merged import with_updates
from vitascope.models.offload.offloaded import IN_TURN, WHOLE, Layers, Offloaded
from vitascope.models.offload.stores import FileStore, KeptStore, Store
from vitascope.models.parts import close
from vitascope.models.pretrained import is_unused, variant_there
from vitascope.models.text.t5.encoder import PROMPTS_AT_ONCE, T5Files
from vitascope.models.text.t5.options import T5Options
from vitascope.models.text.t5.streamed import TABLES, open_layers
from vitascope.nn.storage import Storage
from vitascope.tasks.footprint import Clips, PipelineCosts, TextCost
from vitascope.tasks.known import num_beside
from vitascope.tasks.memory import MemoryPlan, MemoryUse, StagePeak, check_fits, choose_plan, choose_text
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest
from vitascope.weights.lora import Lora
from vitascope.weights.sources import open_source

T = TypeVar("T")
SETTLED_BYTES = 4 << 20
"""A process that grows by less while nothing is made in it has come to rest."""
TOKENIZER_SHARES = {"tokenizer.json": 30, "spiece.model": 100}
"""What a tokeniser takes in memory, as times of its file, whichever of them is there first: of 32 thousand and 256
thousand words, 61 MB and 438 MB were measured with tokenizer.json of 2.05 MB and 16.5 MB."""
HOST_SHARE = 0.7
"""Of the machine's free memory that may hold weights on their way to a GPU; what is larger stays in its files."""


@dataclass(frozen=True)
class MemoryLimit:
    """What models may take of the memory of their device, in bytes: on a CPU with all else that the process holds.

    lossy: layers may be kept in fp8. on_plan: told of each plan before it is carried out.
    """

    num_bytes: int
    lossy: bool = False
    on_plan: Callable[[MemoryPlan], None] = lambda plan: None


class Fitted:
    """`tasks.pipeline.Residence` that keeps a limit: plans for what is asked for, and moves parts as planned.

    parts: the models whose weights come and go, by their field of the pipeline. text: of an encoder that comes and goes
    by itself; open_text: that encoder, with its layers where they are given to be. One clip, or batch of clips, is made
    at a time. Raises InputError for a limit that is used up already.
    """

    def __init__(
        self,
        parts: Mapping[str, Offloaded],
        device: torch.device,
        limit: MemoryLimit,
        text: TextCost | None = None,
        image_bytes: int = 0,
        exact_storages: Sequence[Storage] = (),
        open_text: Callable[[Layers], TextEncoder] | None = None,
    ) -> None:
        self.parts, self.device, self.limit = dict(parts), device, limit
        self._text, self._image_bytes, self._exact_storages = text, image_bytes, exact_storages
        self._open_text = open_text
        self._plans: dict[Clips, MemoryPlan] = {}
        self._working: list[str] = []
        self._start = held_bytes(device)
        self._measured: dict[str, int] = {}
        self._ahead: dict[str, int] = {}
        self._plan: MemoryPlan | None = None
        if self.room <= 0:
            before = format_bytes(self._start)
            raise InputError(f"memory {format_bytes(limit.num_bytes)} is too little: {before} are taken before a model")

    @property
    def room(self) -> int:
        """Bytes that are left to models."""
        return self.limit.num_bytes - self._start

    @property
    def use(self) -> MemoryUse | None:
        """Of the clips made last."""
        return None if self._plan is None else MemoryUse(self._plan, dict(self._measured))

    def fit(self, pipeline: Pipeline, requests: Sequence[GenerateRequest], guided: bool) -> Pipeline:
        """The pipeline as it should make these clips. Raises InputError where no plan keeps the limit."""
        clips = clips_of(pipeline, requests, guided)
        if clips not in self._plans:
            costs = self._costs(pipeline, clips)
            self._plans[clips] = self._settled(
                lambda room: choose_plan(costs, room, taken=self._start, lossy=self.limit.lossy)
            )
        plan = self._plans[clips]
        if plan is not self._plan:
            self.limit.on_plan(plan)
            for name, part in self.parts.items():
                part.change(plan.denoising.layers if name == "denoiser" else WHOLE if plan.together else IN_TURN)
                if plan.together:
                    part.bring()
        self._plan, self._measured, self._ahead = plan, self._ahead, {}
        most = None if plan.denoising.branches_together else len(requests)
        text = self._encoder(pipeline, plan.text)
        return replace(pipeline, text_encoder=text, decoding=plan.decoding, max_clips=most)

    def fill(self, pipeline: Pipeline, prompts: Sequence[str]) -> None:
        """See to it that a text encoder which keeps what it made knows all these prompts, as many at a time as fit.
        Raises InputError where not even one does."""
        if not isinstance(pipeline.text_encoder, KeepsTexts):
            return
        count, step = min(len(prompts), PROMPTS_AT_ONCE), len(prompts)
        layers, stage = self._text_of(pipeline, count)
        while stage is not None and stage.total > self.room and count > 1:
            count = step = count // 2
            layers, stage = self._text_of(pipeline, count)
        if stage is not None:
            check_fits(stage, self.room, self._start)
        encoder = self._encoder(pipeline, layers)
        assert isinstance(encoder, KeepsTexts)
        with self.at_work("text_encoder", "text"):
            for start in range(0, len(prompts), step):
                encoder.fill(prompts[start : start + step])
        self._ahead = {"text": self._measured.pop("text", 0)}

    def merge(self, loras: Sequence[tuple[Lora, float]]) -> None:
        """Merge LoRAs, each times its scale, into the denoiser's weights when they are read, for good. Raises
        CheckpointError for one that does not fit, and changes nothing then."""
        part = self.parts["denoiser"]
        updates = updates_of(part.module, loras)
        part.away()
        part.store = with_updates(part.store, part.module, updates)
        self._exact_storages = ()  # the sums are no numbers of bf16 any more
        self._plans.clear()
        self._plan = None

    def _text_of(self, pipeline: Pipeline, count: int) -> tuple[Layers, StagePeak | None]:
        costs = self._costs(pipeline, Clips(pipeline.defaults.clip, count, guided=False))
        return self._settled(lambda room: choose_text(costs, room))

    def _encoder(self, pipeline: Pipeline, layers: Layers) -> TextEncoder:
        return pipeline.text_encoder if layers == WHOLE or self._open_text is None else self._open_text(layers)

    def _costs(self, pipeline: Pipeline, clips: Clips) -> PipelineCosts:
        return PipelineCosts(pipeline, self.parts, clips, self._text, self._image_bytes, self._exact_storages)

    def _settled(self, choose: Callable[[int], T]) -> T:
        """What is chosen for the room there is; what finding it out has left behind in the process is not the models'
        to use."""
        while True:
            before = self.room
            chosen = choose(before)
            if not any(part.present for part in self.parts.values()):
                release_freed_memory()
                self._start = max(self._start, held_bytes(self.device))
            if self.room >= before - SETTLED_BYTES:
                return chosen

    @contextmanager
    def at_work(self, part: str, stage: str) -> Iterator[None]:
        """A block in which a part is on the device and, unless all stay together, no other; measured as `stage`."""
        together = self._plan is not None and self._plan.together
        with PeakMemory(self.device) as peak:
            self._bring(part, together)
            self._working.append(part)
            try:
                yield
            finally:
                self._working.pop()
                if self._working:
                    self._bring(self._working[-1], together)
        found = max(0, peak.start + peak.growth - self._start)
        self._measured[stage] = max(found, self._measured.get(stage, 0))

    def release(self) -> None:
        """Take all weights away."""
        for part in self.parts.values():
            part.away()

    def _bring(self, name: str, together: bool) -> None:
        if not together:
            for other, part in self.parts.items():
                if other != name and part.present:
                    part.away()
        if name in self.parts:
            self.parts[name].bring()


class OnDemand:
    """`core.protocols.ImageEncoder` that is loaded for each call and released after it."""

    def __init__(self, load: Callable[[], ImageEncoder]) -> None:
        self._load = load

    def __call__(self, pictures: Tensor) -> Tensor:
        return self._load()(pictures)


def clips_of(pipeline: Pipeline, requests: Sequence[GenerateRequest], guided: bool) -> Clips:
    """What of some requests says how much memory they take."""
    first, own = requests[0], pipeline.defaults.guidance
    stride, frames = pipeline.video_codec.strides.time, 0
    perturbed = own.perturbed if first.stg_scale is None else first.stg_scale
    for given in (request.given for request in requests):
        if given.video is not None or pipeline.denoiser.capabilities.condition_channels:
            frames = first.format.num_frames
        elif given.past is not None:
            frames = max(frames, len(given.past))
        elif given.keyframes:
            frames = max(frames, 1 + stride)
        frames = max(frames, *(len(shot.frames) for shot in given.shots), 0)
    return Clips(
        first.format,
        len(requests),
        guided,
        first.given.camera is not None,
        frames,
        max(num_beside(pipeline, first.format, request.given) for request in requests),
        None if first.step_cache is None else first.step_cache.kind,
        (first.stg_by or own.perturbation) if perturbed else None,
    )


def fit_parts(pipeline: Pipeline, stores: Mapping[str, FileStore], limit: MemoryLimit, **more: Any) -> Pipeline:
    """A pipeline whose parts are on the meta device, with weights that come from `stores`. more: as `Fitted` has it."""
    device, parts = pipeline.device, {}
    for name, store in stores.items():
        module: Any = getattr(pipeline, name)
        parts[name] = Offloaded(module, _near(store, module, device), device, WHOLE, _regions(name, module))
    return replace(pipeline, memory=Fitted(parts, device, limit, **more))


def fit_published(
    pipeline: Pipeline,
    folder: Path,
    texts: T5Files,
    stores: Mapping[str, FileStore],
    options: T5Options,
    limit: MemoryLimit,
    open_text: Callable[[Layers], TextEncoder],
) -> Pipeline:
    """`fit_parts` of a public model, with what its encoders of texts and pictures take. open_text: `Fitted`."""
    exact: tuple[Storage, ...] = ()
    source = stores["denoiser"].source
    if pipeline.precision == torch.float32:
        kinds = {source.info(name).dtype for name in source.names()}
        exact = ("bf16",) if kinds == {torch.bfloat16} else ()
    pictures = folder / "image_encoder"
    image = 4 * _num_values(pictures, texts.variant) if pipeline.image_encoder is not None and pictures.is_dir() else 0
    text = text_cost(texts, options, pipeline.precision)
    if text_device(text, pipeline.device, limit) != pipeline.device:
        text = TextCost(0, text.tokens, 0, 0, 0)  # nothing of it is on the device
    elif pipeline.device.type == "cpu":
        text = with_layers(text, texts, pipeline.precision)
    more: dict[str, Any] = {"image_bytes": image, "exact_storages": exact, "open_text": open_text}
    return fit_parts(pipeline, stores, limit, text=text, **more)


def text_cost(files: T5Files, options: T5Options, dtype: torch.dtype) -> TextCost:
    """Of a T5 encoder."""
    width, hidden, heads = files.sizes
    return TextCost(
        _num_values(files.encoder, files.variant) * dtype.itemsize, options.max_tokens, width, hidden, heads
    )


def with_layers(text: TextCost, files: T5Files, dtype: torch.dtype) -> TextCost:
    """The cost of an encoder whose layers may come from its files on a CPU, in whose memory its tokeniser is too."""

    def held() -> Offloaded:
        return open_layers(files.encoder, dtype=dtype, allow_pickle=files.allow_pickle, variant=files.variant)

    names = [file.name for file in files.tokenizer.glob("*")] if files.tokenizer.is_dir() else []
    known = [name for name in TOKENIZER_SHARES if name in names]
    size = (files.tokenizer / known[0]).stat().st_size * TOKENIZER_SHARES[known[0]] if known else 0
    return replace(text, tokenizer=size, held=cache(held))


def text_device(text: TextCost, device: torch.device, limit: MemoryLimit) -> torch.device:
    """Where prompts are read: on the CPU where the encoder alone would take the GPU's limit."""
    fits = text.weights + text.working(2, 4) < limit.num_bytes
    return device if fits or device.type == "cpu" else torch.device("cpu")


def _num_values(place: Path, variant: str) -> int:
    """Numbers in the weights of an encoder, without those of a decoder beside it."""
    # a file of the authors was allowed when it was found
    source = open_source(place, allow_pickle=True, variant=variant_there(place, variant))
    names = [name for name in source.names() if not is_unused(name)]
    if set(TABLES) <= set(names):
        names.remove(TABLES[1])  # the same once more
    num_values = sum(prod(source.info(name).shape) for name in names)
    close(source)
    return num_values


def _near(store: FileStore, module: nn.Module, device: torch.device) -> Store:
    """Weights for a GPU wait in the machine's memory where there is room for them."""
    like = module.state_dict()
    size = sum(tensor.numel() * tensor.element_size() for tensor in like.values())
    if device.type != "cuda" or size > HOST_SHARE * available_bytes():
        return store
    return KeptStore.fill(store, like, pinned=True)


def _regions(name: str, module: Any) -> list[nn.Module]:
    """The layers of a denoiser, and the two halves of a codec, which never work at once."""
    if name == "denoiser":
        return list(getattr(module, "regions", ()))
    halves = [getattr(module, half, None) for half in ("encoder", "decoder")]
    return [half for half in halves if isinstance(half, nn.Module)]
