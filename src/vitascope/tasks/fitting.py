"""Pipelines whose parts come to the device when they work, in the way that a limit of memory asks for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitascope.core.errors import InputError
from vitascope.core.freed_memory import release_freed_memory
from vitascope.core.memory import PeakMemory, available_bytes, format_bytes, held_bytes
from vitascope.core.protocols import ImageEncoder, KeepsTexts, TextEncoder
from vitascope.models.image.clip.encoder import CLASSES
from vitascope.models.lora import updates_of
from vitascope.models.offload.merged import with_updates
from vitascope.models.offload.offloaded import IN_TURN, WHOLE, Layers, Offloaded
from vitascope.models.offload.stores import FileStore, KeptStore, Store
from vitascope.models.pretrained import import_pretrained
from vitascope.models.text.t5.encoder import PROMPTS_AT_ONCE, T5Files
from vitascope.models.text.t5.options import T5Options
from vitascope.nn.storage import Storage
from vitascope.tasks.clips import Clips, clips_of, longest_of
from vitascope.tasks.footprint import PipelineCosts
from vitascope.tasks.memory import MemoryPlan, MemoryUse, StagePeak, check_fits, choose_plan, choose_text
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest
from vitascope.tasks.text_cost import TextCost, image_bytes, text_cost, with_layers
from vitascope.weights.lora import Lora

T = TypeVar("T")
SETTLED_BYTES = 4 << 20
"""A process that grows by less while nothing is made in it has come to rest."""
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
        self._ahead: tuple[StagePeak, Layers, int] | None = None
        self._plan: MemoryPlan | None = None
        self._shown: MemoryPlan | None = None
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
        return None if self._shown is None else MemoryUse(self._shown, dict(self._measured))

    def add(self, name: str, module: nn.Module, store: FileStore) -> None:
        """One more part, or another one of that name: on the meta device, its weights in `store`."""
        self._forget()
        if name in self.parts:
            self.parts[name].away()
        self.parts[name] = _part(name, module, store, self.device)

    def fit(
        self,
        pipeline: Pipeline,
        requests: Sequence[GenerateRequest],
        guided: bool,
        enlarged_from: tuple[int, int] | None = None,
    ) -> Pipeline:
        """The pipeline as it should make these clips. enlarged_from: rows and columns of latents that are enlarged to
        theirs by the part "latent_upsampler". Raises InputError where no plan keeps the limit."""
        clips = replace(clips_of(pipeline, requests, guided), enlarged_from=enlarged_from)
        if clips not in self._plans:
            costs = self._costs(pipeline, clips)
            self._plans[clips] = self._settled(
                lambda room: choose_plan(costs, room, taken=self._start, lossy=self.limit.lossy)
            )
        plan = self._plans[clips]
        self._measured, self._shown = {}, plan
        if self._ahead is not None:
            stage, layers, self._measured["text"] = self._ahead
            self._shown, self._ahead = _read_ahead(plan, stage, layers), None
        if plan is not self._plan:
            self.limit.on_plan(self._shown)
            for name, part in self.parts.items():
                part.change(plan.denoising.layers if name == "denoiser" else WHOLE if plan.together else IN_TURN)
                if plan.together:
                    part.bring()
        self._plan = plan
        most = None if plan.denoising.branches_together else len(requests)
        text = self._encoder(pipeline, plan.text)
        return replace(pipeline, text_encoder=text, decoding=plan.decoding, max_clips=most)

    def fill(self, pipeline: Pipeline, prompts: Sequence[str]) -> None:
        """See to it that a text encoder which keeps what it made knows all these prompts, as many at a time as fit.
        Raises InputError where not even one does."""
        if not isinstance(pipeline.text_encoder, KeepsTexts):
            return
        prompts = pipeline.text_encoder.missing(prompts)
        if not prompts:
            return
        count, step = min(len(prompts), PROMPTS_AT_ONCE), len(prompts)
        longest = longest_of(prompts)
        layers, stage = self._text_of(pipeline, count, longest)
        while stage is not None and stage.total > self.room and count > 1:
            count = step = count // 2
            layers, stage = self._text_of(pipeline, count, longest)
        if stage is not None:
            check_fits(stage, self.room, self._start)
        encoder = self._encoder(pipeline, layers)
        assert isinstance(encoder, KeepsTexts)
        with self.at_work("text_encoder", "text"):
            for start in range(0, len(prompts), step):
                encoder.fill(prompts[start : start + step])
        measured = self._measured.pop("text", 0)
        self._ahead = None if stage is None else (stage, layers, measured)

    def merge(self, loras: Sequence[tuple[Lora, float]]) -> None:
        """Merge LoRAs, each times its scale, into the denoiser's weights when they are read, for good. Raises
        CheckpointError for one that does not fit, and changes nothing then."""
        part = self.parts["denoiser"]
        updates = updates_of(part.module, loras)
        part.away()
        part.store = with_updates(part.store, part.module, updates)
        self._exact_storages = ()  # the sums are no numbers of bf16 any more
        self._forget()

    def _forget(self) -> None:
        """All plans: parts are not what they were made for."""
        self._plans.clear()
        self._plan = self._shown = None

    def _text_of(self, pipeline: Pipeline, count: int, longest: int) -> tuple[Layers, StagePeak | None]:
        costs = self._costs(pipeline, Clips(pipeline.defaults.clip, count, guided=False, longest=longest))
        return self._settled(lambda room: choose_text(costs, room))

    def _encoder(self, pipeline: Pipeline, layers: Layers) -> TextEncoder:
        """The encoder with its layers kept that way, where they are read from its files."""
        if self._open_text is None or self._text is None or self._text.held is None:
            return pipeline.text_encoder
        return self._open_text(layers)

    def _costs(self, pipeline: Pipeline, clips: Clips) -> PipelineCosts:
        return PipelineCosts(pipeline, self.parts, clips, self._text, self._image_bytes, self._exact_storages)

    def _settled(self, choose: Callable[[int], T]) -> T:
        """What is chosen for the room there is; what finding it out has left behind in the process is not the models'
        to use. Raises InputError, which says the least that will do, where nothing fits."""
        while True:
            before = self.room
            try:
                chosen = choose(before)
            except InputError:
                if self._settle() >= before - SETTLED_BYTES:
                    raise
            else:
                if self._settle() >= before - SETTLED_BYTES:
                    return chosen

    def _settle(self) -> int:
        """The room there is now, where no model is in it."""
        if not any(part.present for part in self.parts.values()):
            gc.collect()  # models without values refer to themselves
            release_freed_memory()
            self._start = max(self._start, held_bytes(self.device))
        return self.room

    @contextmanager
    def at_work(self, part: str, stage: str) -> Iterator[None]:
        """A block in which a part is on the device and, unless all stay together, no other; measured as `stage`."""
        together = self._plan is not None and self._plan.together
        self._leave(part, together)
        with PeakMemory(self.device) as peak:
            self._bring(part, together)
            self._working.append(part)
            try:
                yield
            finally:
                self._working.pop()
                if part not in self.parts and self.device.type == "cpu":
                    release_freed_memory()  # such as what a tokeniser was made of
                if self._working:
                    self._bring(self._working[-1], together)
        found = max(0, peak.start + peak.growth - self._start)
        self._measured[stage] = max(found, self._measured.get(stage, 0))

    def release(self) -> None:
        """Take all weights away."""
        for part in self.parts.values():
            part.away()

    def _leave(self, name: str, together: bool) -> None:
        """Take the weights of all other parts away, unless all stay."""
        for other, part in self.parts.items():
            if other != name and part.present and not together:
                part.away()

    def _bring(self, name: str, together: bool) -> None:
        self._leave(name, together)
        if name in self.parts:
            self.parts[name].bring()


class OnDemand:
    """`core.protocols.ImageEncoder` that is loaded for each call and released after it."""

    def __init__(self, load: Callable[[], ImageEncoder]) -> None:
        self._load = load

    def __call__(self, pictures: Tensor) -> Tensor:
        encoder = self._load()
        try:
            if isinstance(encoder, nn.Module):
                encoder._apply(torch.clone)  # weights may be pages of their file, which no limit counts
            return encoder(pictures)
        finally:
            del encoder
            gc.collect()  # its parts may refer to each other


def _read_ahead(plan: MemoryPlan, stage: StagePeak, layers: Layers) -> MemoryPlan:
    """The plan with what was planned for prompts that were read before."""
    own = next((other for other in plan.stages if other.name == stage.name), None)
    if own is None or own.total >= stage.total:
        return plan
    return replace(plan, stages=tuple(stage if other is own else other for other in plan.stages), text=layers)


def fit_parts(pipeline: Pipeline, stores: Mapping[str, FileStore], limit: MemoryLimit, **more: Any) -> Pipeline:
    """A pipeline whose parts are on the meta device, with weights that come from `stores`. more: as `Fitted` has it."""
    device = pipeline.device
    parts = {name: _part(name, getattr(pipeline, name), store, device) for name, store in stores.items()}
    return replace(pipeline, memory=Fitted(parts, device, limit, **more))


def fit_published(
    pipeline: Pipeline,
    pictures: Path | None,
    texts: T5Files,
    stores: Mapping[str, FileStore],
    options: T5Options,
    limit: MemoryLimit,
    open_text: Callable[[Layers], TextEncoder],
) -> Pipeline:
    """`fit_parts` of a public model, with what its encoders of texts and pictures take. pictures: where the latter is,
    if there is one. open_text: `Fitted`."""
    exact: tuple[Storage, ...] = ()
    source = stores["denoiser"].source
    if pipeline.precision == torch.float32:
        kinds = {source.info(name).dtype for name in source.names()}
        exact = ("bf16",) if kinds == {torch.bfloat16} else ()
    image = 0
    if pictures is not None:
        import_pretrained(CLASSES)  # what its code takes is there before what is left to models is counted
        image = image_bytes(pictures, texts.variant)
    text = text_cost(texts, options, pipeline.precision)
    if text_device(text, pipeline.device, limit) != pipeline.device:
        text = TextCost(0, text.tokens, 0, 0, 0)  # nothing of it is on the device
    elif pipeline.device.type == "cpu":
        text = with_layers(text, texts, pipeline.precision)
    more: dict[str, Any] = {"image_bytes": image, "exact_storages": exact, "open_text": open_text}
    return fit_parts(pipeline, stores, limit, text=text, **more)


def text_device(text: TextCost, device: torch.device, limit: MemoryLimit) -> torch.device:
    """Where prompts are read: on the CPU where the encoder alone would take the GPU's limit."""
    fits = text.weights + text.working(2, None, torch.float32) < limit.num_bytes
    return device if fits or device.type == "cpu" else torch.device("cpu")


def _part(name: str, module: nn.Module, store: FileStore, device: torch.device) -> Offloaded:
    return Offloaded(module, _near(store, module, device), device, WHOLE, _regions(name, module))


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
