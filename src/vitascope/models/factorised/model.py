"""The factorised denoiser: video and audio latents, noise levels, text and camera to a prediction per track.

B batch, T frames of tokens, N tokens a frame (rows x columns), A audio tokens, S text tokens, X text width, D video
width, C audio width. Differs from the reference design in three places: normalisation is per branch and modulated per
cell (not per clip), audio is generated and not only read, and both tracks read each other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError
from vitascope.core.protocols import FULL, Capabilities, Passage, State, TemporalStrategy, check_call
from vitascope.core.tracks import AUDIO, VIDEO, TextContext, Track, Tracks
from vitascope.models.factorised.block import AUDIO_VECTORS, EXCHANGE_VECTORS, VIDEO_VECTORS, Layer, Surroundings
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.local import LocalDown, LocalUp
from vitascope.models.factorised.timing import Spans, build_masks
from vitascope.nn.checkpointing import run_layer
from vitascope.nn.embeddings import CameraEmbedding, LabelEmbedding, LevelEmbedding, SpatialPositions, sinusoidal
from vitascope.nn.modulation import ModulationProjection, OwnModulation, modulate
from vitascope.nn.norms import RMSNorm, layer_norm
from vitascope.nn.patches import check_patch, patchify, token_levels, unpatchify
from vitascope.ops.rope import axial_table, rotary_table


class TrackEnds(nn.Module):
    """What a track has outside the layers: token embedding, condition, and the head, which starts at zero."""

    def __init__(self, config: FactorisedConfig, width: int, values: int, num_vectors: int) -> None:
        super().__init__()
        self.embed = nn.Linear(values, width)
        self.level = LevelEmbedding(width)
        self.text = nn.Linear(config.text_width, width)
        self.shared = ModulationProjection(width, width, num_vectors) if config.modulation == "shared" else None
        self.head_modulation = OwnModulation(width, width, 2)
        self.head = nn.Linear(width, values)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def finish(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (..., width) to (..., values)."""
        return self.head(modulate(layer_norm(x), *self.head_modulation(condition)))

    def project(self, condition: Tensor) -> Tensor:
        """What the blocks' modulations are given."""
        return condition if self.shared is None else self.shared(condition)


class FactorisedDenoiser(nn.Module):
    """`core.protocols.Denoiser`. `gradient_checkpointing` trades a second forward pass per layer for memory."""

    def __init__(self, config: FactorisedConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        more = EXCHANGE_VECTORS if config.exchanges else 0
        self.text_norm = RMSNorm(config.text_width)
        self.labels = LabelEmbedding(config.num_classes, config.text_width) if config.num_classes else None
        self.video = self.audio = self.camera = self.places = self.down = self.up = None
        if config.video_channels:
            self.video = TrackEnds(config, config.width, config.patch_values, VIDEO_VECTORS + more)
            self.places = SpatialPositions(*config.base_grid, config.width)
            self.camera = CameraEmbedding(config.width) if config.camera else None
            if config.local_channels:
                (down, up), ends = config.local_blocks, (config.patch[1:], config.width)
                self.down = LocalDown(config.video_channels, config.local_channels, down, *ends)
                self.up = LocalUp(config.video_channels, config.local_channels, up, *ends)
        if config.audio_channels:
            values = config.audio_channels * config.audio_patch
            self.audio = TrackEnds(config, config.audio_width, values, AUDIO_VECTORS + more)
        self.layers = nn.ModuleList(Layer(config, index in config.exchanges) for index in range(config.depth))

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return self.config.patch

    @property
    def regions(self) -> list[nn.Module]:
        """The parts that are worth compiling, each on its own; equal ones share a graph."""
        return [*self.layers, *(part for part in (self.down, self.up) if part is not None)]

    @property
    def capabilities(self) -> Capabilities:
        """What this model can take."""
        names = [name for name, ends in ((VIDEO, self.video), (AUDIO, self.audio)) if ends is not None]
        config = self.config
        return Capabilities(tuple(names), config.prediction, "cell", config.strategies, self.camera is not None)

    def label_context(self, labels: Tensor) -> TextContext:
        """Class labels (B,), -1 for none, as the text of a call. Raises CapabilityError for a model without classes."""
        if self.labels is None:
            raise CapabilityError("this model has no class labels; it is conditioned by text")
        return self.labels(labels)

    def forward(
        self,
        tracks: Tracks,
        text: TextContext,
        camera: Tensor | None = None,
        strategy: TemporalStrategy = FULL,
    ) -> dict[str, Tensor]:
        """The prediction named by `config.prediction` for every track given, in the shape and dtype of its values.

        tracks: "video", "audio" or both. camera: (B, latent frames, 7), see `CameraEmbedding`. Raises CapabilityError
        for a track, camera or strategy that the model does not have, ShapeError for sizes that do not fit the patch.
        """
        state, passage = self.enter(tracks, text, camera, strategy)
        return passage.run(state)

    def enter(
        self,
        tracks: Tracks,
        text: TextContext,
        camera: Tensor | None = None,
        strategy: TemporalStrategy = FULL,
    ) -> tuple[State, Passage]:
        """`forward`, taken apart: the state is (video tokens, audio tokens). The signal is what the first
        attention reads of the video, or of the audio in a call without video."""
        self._check(tracks, camera, strategy)
        video, audio = tracks.get(VIDEO), tracks.get(AUDIO)
        video_spans = None if video is None else Spans.of(video.times_s, self.config.patch[0])
        audio_spans = None if audio is None else Spans.of(audio.times_s, self.config.audio_patch)
        mask = text.mask.unsqueeze(-1)
        pooled_BX = (text.embeddings * mask).sum(1) / mask.sum(1).clamp_min(1)
        x = y = video_condition = audio_condition = near_BTHWD = None
        cells = 1
        near: list[Tensor] = []
        if video is not None and video_spans is not None:
            x = self._embed_video(video.values, video_spans)
            video_condition = self._video_condition(video, pooled_BX, camera)
            cells = x.shape[2]
            if self.down is not None:
                near_BTHWD = self._on_grid(video_condition, video.values)
                more, near = self.down(video.values, near_BTHWD)
                x = x + more
        if audio is not None and audio_spans is not None:
            y = self._embed_audio(audio.values, audio_spans)
            audio_condition = self._audio_condition(audio, pooled_BX)
        around = Surroundings(
            self.text_norm(text.embeddings),
            text.mask,
            None if video_condition is None or self.video is None else self.video.project(video_condition),
            None if audio_condition is None or self.audio is None else self.audio.project(audio_condition),
            masks=build_masks(strategy, video_spans, audio_spans, cells),
            **self._tables(video, video_spans, audio_spans),
        )

        def run(module: nn.Module, state: State, alone: bool = False) -> State:
            return run_layer(self.gradient_checkpointing, module, *state, around, alone)

        def finish(state: State) -> dict[str, Tensor]:
            (x, y), out = state, {}
            if video is not None and x is not None and video_condition is not None:
                out[VIDEO] = self._finish_video(x, video, video_condition, near, near_BTHWD)
            if audio is not None and y is not None and audio_condition is not None:
                out[AUDIO] = self._finish_audio(y, audio, audio_condition)
            return out

        def signal(state: State) -> Tensor:
            (x, y), first = state, self.layers[0]
            assert isinstance(first, Layer)
            return first.modulated(x, y, around)

        return (x, y), Passage(tuple(partial(run, layer) for layer in self.layers), finish, signal)

    def _check(self, tracks: Tracks, camera: Tensor | None, strategy: TemporalStrategy) -> None:
        check_call(self.capabilities, tracks, camera, strategy)
        for name, patch in ((VIDEO, self.config.patch), (AUDIO, (self.config.audio_patch,))):
            if name in tracks:
                check_patch(name, tracks[name].values.shape[2:], patch)

    def _finish_video(
        self, x_BTND: Tensor, track: Track, condition: Tensor, near: list[Tensor], near_BTHWD: Tensor | None
    ) -> Tensor:
        assert self.video is not None
        prediction = unpatchify(self.video.finish(x_BTND, condition), self.config.patch, track.values.shape)
        if self.up is not None:
            prediction = prediction + self.up(x_BTND, near, near_BTHWD)
        return prediction.to(track.values.dtype)

    def _finish_audio(self, y_BAC: Tensor, track: Track, condition: Tensor) -> Tensor:
        assert self.audio is not None
        values = self.audio.finish(y_BAC, condition).unflatten(-1, (self.config.audio_channels, -1))
        return values.transpose(1, 2).flatten(2).to(track.values.dtype)

    def _embed_video(self, values: Tensor, spans: Spans) -> Tensor:
        assert self.video is not None
        assert self.places is not None
        (_, ph, pw), (rows, columns) = self.config.patch, values.shape[3:]
        x_BTND = self.video.embed(patchify(values, self.config.patch))
        return x_BTND + (self.places(rows // ph, columns // pw) + self._seconds(spans, x_BTND.shape[-1])[:, None])

    def _embed_audio(self, values: Tensor, spans: Spans) -> Tensor:
        assert self.audio is not None
        y_BAC = self.audio.embed(values.unflatten(2, (-1, self.config.audio_patch)).transpose(1, 2).flatten(2))
        return y_BAC + self._seconds(spans, y_BAC.shape[-1])

    def _seconds(self, spans: Spans, width: int) -> Tensor:
        return sinusoidal(spans.centres, width, self.config.min_period_s, self.config.max_period_s)

    def _video_condition(self, track: Track, pooled_BX: Tensor, camera: Tensor | None) -> Tensor:
        """(B, 1|T, 1|N, D): one vector a frame where the levels are given per frame, else one a token."""
        assert self.video is not None
        pt = self.config.patch[0]
        condition = self.video.level(token_levels(track, self.config.patch)) + self.video.text(pooled_BX)[:, None, None]
        if self.camera is not None:
            motion_BTD = self.camera(camera)
            if camera is not None and pt > 1:
                motion_BTD = motion_BTD.unflatten(1, (-1, pt)).mean(2)
            condition = condition + motion_BTD[:, :, None]
        return condition

    def _on_grid(self, condition_BTND: Tensor, values: Tensor) -> Tensor:
        """(B, 1|T, 1|N, D) to (B, 1|T, 1|h, 1|w, D), h x w tokens."""
        one = condition_BTND.shape[2] == 1
        grid = (1, 1) if one else tuple(values.shape[axis + 3] // self.config.patch[axis + 1] for axis in (0, 1))
        return condition_BTND.unflatten(2, grid)

    def _audio_condition(self, track: Track, pooled_BX: Tensor) -> Tensor:
        """(B, 1|A, C)."""
        assert self.audio is not None
        levels_BN, patch = track.noise[:, 0], self.config.audio_patch
        if levels_BN.shape[1] > 1:
            levels_BN = levels_BN.unflatten(1, (-1, patch)).mean(2)
        return self.audio.level(levels_BN) + self.audio.text(pooled_BX)[:, None]

    def _tables(self, video: Track | None, video_spans: Spans | None, audio_spans: Spans | None) -> dict[str, Any]:
        """The rotary tables of `Surroundings`."""
        config, tables = self.config, {}
        periods = (config.min_period_s, config.max_period_s)
        each, audio_each = config.width // config.num_heads, config.audio_width // config.audio_heads
        if audio_spans is not None:
            tables["audio_table"] = rotary_table(audio_spans.centres, audio_each, *periods)
        if video is None or video_spans is None:
            return tables
        rows, columns = video.values.shape[3] // config.patch[1], video.values.shape[4] // config.patch[2]
        if config.positions == "rotary":
            # Rows and columns as shares of the frame's height: a finer grid shows the same places.
            index = torch.arange(rows * columns, device=video.values.device)
            axes = ((index // columns + 0.5) / rows, (index % columns + 0.5) / rows)
            tables["space_table"] = axial_table(axes, each, 2 / config.base_grid[0], 10.0)
            tables["time_table"] = rotary_table(video_spans.centres, each, *periods)
        if audio_spans is not None and config.exchanges:
            times = video_spans.centres.repeat_interleave(rows * columns)
            tables["exchange_tables"] = (rotary_table(times, audio_each, *periods), tables["audio_table"])
        return tables
