"""What making a clip takes: weights by their sizes, and what is worked out with them by running the same code on
tensors without values (`nn.footprint`). No weights are needed for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import nn

from vitascope.caches.steps import Kind, Lead, StepCache, StepCaching
from vitascope.core.protocols import State
from vitascope.core.shapes import latent_frames, num_audio_latents
from vitascope.core.tracks import AUDIO, VIDEO, TextContext, Track
from vitascope.diffusion.guidance import Guidance, GuidedDenoiser, busy_values
from vitascope.models.codecs.decoding import AS_IT_IS, Decoding, Streams, Tiles, decode_frames
from vitascope.models.offload.offloaded import IN_TURN, WHOLE, Layers, Offloaded, WeightBytes
from vitascope.models.text.t5.encoder import PROMPTS_AT_ONCE
from vitascope.nn.footprint import Footprint, footprint, hollow, without_values
from vitascope.nn.storage import Storage
from vitascope.nn.tiling import Tiling
from vitascope.tasks.clips import Clips
from vitascope.tasks.discover import UPSAMPLER
from vitascope.tasks.memory import StagePeak
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.text_cost import TextCost

STEADY_FRAMES = 6
"""Latent frames, at least, after which a codec that goes chunk by chunk holds no more than before."""
SAMPLER_COPIES = 8
"""Times the tracks that samplers hold beside a call of the denoiser, in fp32: two estimates back, what is combined."""
ENLARGED_COPIES = 4
"""Times the latents of a clip, in fp32, that are held around its up-sampler: as they came, as they go, statistics."""
KERNEL_BYTES = {"cpu": 24 << 20, "cuda": 96 << 20}
"""What libraries of kernels take for themselves: workspaces and packed matrices, beside all tensors."""
TILES = (48, 32, 24, 16, 12, 8)
"""Sides of tiles in latents, tried from the largest."""


class _Anew(StepCache):
    """A step cache that runs all blocks every time: what it holds can be counted without knowing a value."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(StepCaching(kind), ())

    def _decide(self, evidence: State, level: object) -> bool:
        self._lead = Lead(evidence)
        return False


class PipelineCosts:
    """`tasks.memory.Costs` of clips made by a pipeline, with the parts in `parts` (the denoiser is one)."""

    def __init__(
        self,
        pipeline: Pipeline,
        parts: Mapping[str, Offloaded],
        clips: Clips,
        text: TextCost | None = None,
        image_bytes: int = 0,
        exact_storages: Sequence[Storage] = (),
    ) -> None:
        self.pipeline, self.parts, self.clips = pipeline, dict(parts), clips
        self.exact_storages = exact_storages
        self._text, self._image_bytes = text, image_bytes
        self._kernels = KERNEL_BYTES.get(pipeline.device.type, KERNEL_BYTES["cuda"])
        self.denoise, self.decode = cache(self._denoise), cache(self._decode)
        self.encode, self.text = cache(self._encode), cache(self._text_stage)
        self.enlarge = cache(self._enlarge)
        self._reading = cache(self._text_working)

    @property
    def denoiser(self) -> WeightBytes:
        """Its weights."""
        return self.parts["denoiser"].weight_bytes()

    @property
    def others(self) -> int:
        """Weights of all other parts that stay if everything does."""
        return sum(part.weight_bytes().total for name, part in self.parts.items() if name != "denoiser")

    @property
    def decodings(self) -> list[Decoding]:
        """What the video codec offers, the fastest first."""
        codec, fmt = self.pipeline.video_codec, self.clips.format
        choices = [AS_IT_IS]
        if isinstance(codec, Streams):
            choices += [Decoding(chunk) for chunk in (4, 1)]
        side = max(fmt.height_px // codec.strides.height, fmt.width_px // codec.strides.width)
        if isinstance(codec, Tiles):
            choices += [Decoding(1, Tiling(tile, 3 * tile // 8)) for tile in TILES if tile < side]
        return choices

    def layers(self, layers: Layers) -> int:
        """Of the denoiser's weights, with layers kept that way."""
        return self.parts["denoiser"].device_bytes(layers)

    def text_layers(self) -> Sequence[int]:
        """Bytes of the text encoder's layers; none where they cannot come one by one."""
        text = self._text
        if text is None or text.held is None or not self._num_read:
            return ()
        return text.held().weight_bytes().layers

    @property
    def _num_read(self) -> int:
        """Prompts that the text encoder has to read."""
        clips = self.clips
        return clips.count * (1 + clips.guided) if clips.read is None else clips.read

    def _text_working(self) -> int:
        assert self._text is not None
        count = min(self._num_read, PROMPTS_AT_ONCE)
        return self._text.working(count, self.clips.longest, self.pipeline.precision)

    def _text_stage(self, layers: Layers = WHOLE) -> StagePeak | None:
        dtype, text = self.pipeline.precision, self._text
        if text is not None and not self._num_read:
            tokens = text.most_tokens(self.clips.longest, given=True)
            rows = self.clips.count * (1 + self.clips.guided) * tokens * text.width * dtype.itemsize
            # as they were kept, and put together
            return StagePeak("text", self._image_bytes, 2 * rows + (self._kernels if self._image_bytes else 0))
        if text is not None:
            weights, working = text.weights, self._reading()
            if text.held is not None:
                held = text.held()
                weights = held.device_bytes(layers)
                # a weight on its way from its file, while nothing is worked out
                working = max(working, held.transit_bytes())
            # the encoder of pictures comes when that of texts is gone
            return StagePeak("text", max(weights, self._image_bytes), working + text.tokenizer + self._kernels)
        if "text_encoder" in self.parts:
            return StagePeak("text", self.parts["text_encoder"].weight_bytes().total, self._kernels)
        return None

    def _encode(self) -> StagePeak | None:
        frames, fmt = self.clips.encoded_frames, self.clips.format
        if not frames:
            return None
        with without_values():  # in fp32, whatever the pipeline works in
            codec = self._bare(self.pipeline.video_codec)
            pixels = torch.empty(1, 3, frames, fmt.height_px, fmt.width_px)
            reading = footprint(lambda: codec.encode(pixels), self.pipeline.device.type).peak
            working = reading + 2 * pixels.numel() * pixels.element_size()
        return StagePeak("encode", self._weights("video_codec"), working + self._packed("video_codec"))

    def _enlarge(self) -> StagePeak | None:
        """The codec has the statistics of its latents there before and after, the up-sampler its weights between."""
        rows = self.clips.enlarged_from
        if rows is None:
            return None
        codec, part = self.pipeline.video_codec, self.parts[UPSAMPLER]
        with without_values():
            bare = self._bare(part.module)
            frames = latent_frames(self.clips.format.num_frames, codec.strides.time)
            latents = torch.empty(1, codec.latent_channels, frames, *rows)
            working = footprint(lambda: bare(latents), self.pipeline.device.type).peak
        working += ENLARGED_COPIES * 4 * latents.numel() * latents.element_size()
        weights = max(self._weights(UPSAMPLER), self._weights("video_codec"))
        return StagePeak("enlarge", weights, working + self._packed(UPSAMPLER))

    def _denoise(self, together: bool) -> int:
        """Keys and values of the texts, and what one call with all its branches, or each on its own, holds at most."""
        module: Any = self.pipeline.denoiser
        config: Any = getattr(module, "config", None)
        depth = getattr(config, "depth", 0)
        # a step cache runs the first layer apart, and a branch may leave it out: one more, and the rest is as it is
        few = 2 if self.clips.step_cache is None and self.clips.perturbed is None else 3
        if depth > few + 1 and not getattr(config, "exchanges", ()):
            # all layers are alike: each one more adds what it keeps of the texts
            short, longer = (self._call(replace(config, depth=d), together).peak for d in (few, few + 1))
            peak = longer + (depth - few - 1) * max(0, longer - short)
        else:
            peak = self._call(config, together).peak
        values = sum(prod(track.values.shape) for track in self._tracks("meta").values())
        return peak + SAMPLER_COPIES * 4 * values + self._kernels

    def _call(self, config: Any, together: bool) -> Footprint:
        own, clips = self.pipeline.defaults.guidance, self.clips
        # how strongly does not matter, and that it may be for a part of the steps only neither
        guidance = Guidance(2.0 if clips.guided else 1.0, cross_modal=own.cross_modal, rescale=own.rescale)
        if clips.perturbed is not None:
            # which layer does not matter either: all are alike
            guidance = replace(guidance, perturbed=1.0, perturbed_layers=(0,), perturbation=clips.perturbed)
        with without_values(), self._precision():
            denoiser: Any = self._bare(self.pipeline.denoiser, config)
            tracks, texts = self._tracks("cpu"), [self._words() for _ in range(1 + clips.guided)]
            prepare = getattr(denoiser, "prepare", lambda text: text)  # `core.protocols.Prepares`
            camera = torch.empty(clips.count, tracks[VIDEO].values.shape[2], 7) if clips.camera else None

            def run() -> object:
                ready = [prepare(text) for text in texts]
                steps = None if clips.step_cache is None else _Anew(clips.step_cache)
                call = GuidedDenoiser(
                    denoiser, self.pipeline.path, ready[0], ready[-1], guidance, camera=camera,
                    max_clips=None if together else clips.count, steps=steps,
                    busy_values=busy_values(self.pipeline.device),
                )  # fmt: skip
                if steps is not None:
                    call(tracks)  # while blocks run, what they added a step ago is still held
                return ready, call(tracks)

            return footprint(run)

    def _decode(self, how: Decoding) -> StagePeak:
        """With more latent frames than a chunk needs to come to rest, the clip's frames are added by their size."""
        codec, fmt, clips = self.pipeline.video_codec, self.clips.format, self.clips
        count = latent_frames(fmt.num_frames, codec.strides.time)
        chunk = _own_chunk(codec) if how.chunk is None else how.chunk
        traced = min(count, max(STEADY_FRAMES, 1 + 3 * chunk)) if chunk else count
        with without_values(), self._precision():
            bare = self._bare(codec)
            grid = (fmt.height_px // codec.strides.height, fmt.width_px // codec.strides.width)
            if how.tiling is not None:
                grid = (min(grid[0], how.tiling.tile), min(grid[1], how.tiling.tile))
            latents = torch.empty(clips.count, codec.latent_channels, traced, *grid)
            inner = replace(how, tiling=None)
            working = footprint(lambda: decode_frames(bare, latents, inner), self.pipeline.device.type).peak
        side = codec.strides.height * codec.strides.width
        # the 8-bit frames lie in the machine's memory, which is the device's on a CPU alone
        working -= 3 * clips.count * (1 + (traced - 1) * codec.strides.time) * prod(grid) * side
        if self.pipeline.device.type == "cpu":
            values = 3 * clips.count * fmt.num_frames * fmt.height_px * fmt.width_px
            working += values * (1 if how.tiling is None else 5)
        return StagePeak("decode", self._weights("video_codec"), working + self._packed("video_codec"))

    def _weights(self, name: str) -> int:
        """Of a part alone on the device, its layers (of a codec, encoder or decoder) in turn."""
        return self.parts[name].device_bytes(IN_TURN) if name in self.parts else 0

    def _packed(self, name: str) -> int:
        """What kernels take: on a CPU that of convolutions is counted where they run, else it is twice the largest
        one's weights."""
        there = name in self.parts and self.pipeline.device.type != "cpu"
        return self._kernels + (2 * self.parts[name].largest_bytes() if there else 0)

    def _words(self) -> TextContext:
        config: Any = getattr(self.pipeline.denoiser, "config", None)
        tokens = self._text.most_tokens(self.clips.longest, given=True) if self._text is not None else 32
        words = torch.empty(self.clips.count, tokens, config.text_width, dtype=self.pipeline.precision)
        image = None
        if getattr(config, "image_width", 0):
            places = config.image_positions or 257 * self.pipeline.num_pictures
            image = torch.empty(self.clips.count, places, config.image_width)
        return TextContext(words, torch.ones(self.clips.count, tokens, dtype=torch.bool), image)

    def _tracks(self, device: str) -> dict[str, Track]:
        """The tracks as `known.start_tracks` gives them: a level for each latent frame."""
        pipeline, fmt, count = self.pipeline, self.clips.format, self.clips.count
        codec, audio = pipeline.video_codec, pipeline.audio_codec
        frames = latent_frames(fmt.num_frames, codec.strides.time) + self.clips.beside
        grid = (frames, fmt.height_px // codec.strides.height, fmt.width_px // codec.strides.width)
        made = partial(torch.empty, device=device)
        extra = pipeline.denoiser.capabilities.condition_channels
        condition = made(count, extra, *grid) if extra else None
        tracks = {
            VIDEO: Track(
                made(count, codec.latent_channels, *grid), made(count, 1, frames, 1, 1), made(frames), condition
            )
        }
        if audio is not None:
            num = num_audio_latents(fmt.duration_s, audio.sample_rate_hz / audio.hop, pipeline.audio_patch)
            tracks[AUDIO] = Track(made(count, audio.latent_channels, num), made(count, 1, num), made(num))
        return tracks

    def _bare(self, part: object, config: Any = None) -> Any:
        """A part without values, its weights in the dtypes that it has."""
        assert isinstance(part, nn.Module)
        own: Any = part
        return hollow(lambda: type(own)(own.config if config is None else config), part.state_dict(keep_vars=True))

    def _precision(self) -> AbstractContextManager[object]:
        """Autocast as the pipeline runs its parts in; tensors without values say that they are on the CPU."""
        reduced = self.pipeline.precision != torch.float32
        return torch.autocast("cpu", self.pipeline.precision if reduced else torch.bfloat16, enabled=reduced)


def _own_chunk(codec: object) -> int:
    """Latent frames at a time that a codec decodes by itself; 0 for all."""
    if not isinstance(codec, Streams):
        return 0
    return int(signature(codec.stream).parameters["chunk"].default)
