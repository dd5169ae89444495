"""A pool of clips of the world, encoded once: what the denoiser is trained on.

A pool is a folder named by the content it holds: the hash of the codecs' weights, of the world's code, of the clip
format, mix and seed. So a pool of other weights or another world is another folder, never a stale one. It holds shards

    shard_00012.safetensors    video (N, C, T, h, w) and audio (N, C, n) latents, bf16; camera (N, T, 7), fp32;
                               still (N, C, h, w), the latent of one frame frozen, still_frame (N,), where it is;
                               opening (N, C, T, h, w), if asked for, of clips that are gray after their first frame;
                               scenes, JSON in bytes, and scene_ends (N,), where each one ends
    manifest.json              what the name is the hash of

Shards are written whole or not at all, so a build that stops goes on where it was. Scene number i of a pool depends on
(seed, i) alone, whatever the shard size and the number of workers.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from vitascope.core.errors import InputError, TrainingError
from vitascope.core.protocols import AudioCodec
from vitascope.core.random import derive_seed
from vitascope.core.shapes import ClipFormat, num_audio_latents
from vitascope.training.codecs import CodecFiles, Codecs
from vitascope.weights.tensor_file import atomic_file
from vitascope.world.camera import camera_path
from vitascope.world.casting import SceneMix, Split, draw_scene
from vitascope.world.render import render
from vitascope.world.scene import Scene, Subject
from vitascope.world.sound import synthesise_batch

FORMAT = 1
NOT_RENDERED = frozenset({"__init__.py", "captions.py", "grammar.py", "truth.py"})
"""Modules of the world that do not change what a clip looks or sounds like."""


@dataclass(frozen=True)
class PoolSpec:
    """Which clips a pool holds. `weights`: content hashes of the codec files by name. openings: what models read that
    have the first frame beside their latents."""

    weights: dict[str, str]
    mix: SceneMix
    fmt: ClipFormat
    audio_patch: int = 4
    seed: int = 0
    split: Split = "train"
    num_clips: int = 8192
    shard_clips: int = 256
    openings: bool = False

    def __post_init__(self) -> None:
        if self.num_clips < 1 or self.shard_clips < 1 or self.num_clips % self.shard_clips:
            below = max(1, self.num_clips // max(1, self.shard_clips)) * self.shard_clips
            raise InputError(
                f"{self.num_clips} clips do not fill shards of {self.shard_clips}; nearest: "
                f"{below}, {below + self.shard_clips}"
            )

    def identity(self) -> dict[str, Any]:
        """What the content follows from; the number of clips is not part of it, so that a pool can grow."""
        fields = asdict(replace(self, num_clips=self.shard_clips))
        del fields["num_clips"]
        if not self.openings:
            del fields["openings"]
        return {"format": FORMAT, "world": world_hash(), **fields}

    @cached_property
    def digest(self) -> str:
        """The name of the pool."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def world_hash() -> str:
    """Hash of the world's code as parsed: comments, docstrings and layout do not count."""
    import vitascope.world

    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(vitascope.world.__path__[0]).glob("*.py")):
        if path.name not in NOT_RENDERED:
            digest.update(code_fingerprint(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def code_fingerprint(source: str) -> str:
    """What Python makes of `source`, without comments, layout and strings that stand alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
            node.body = kept  # type: ignore[attr-defined]
    return ast.dump(tree)


def scene_to_json(scene: Scene) -> str:
    """A scene as one line of JSON."""
    return json.dumps(asdict(scene), separators=(",", ":"))


def scene_from_json(text: str) -> Scene:
    """The scene that `scene_to_json` wrote."""
    fields = json.loads(text)
    subjects = tuple(Subject(**{**subject, "syllables": tuple(subject["syllables"])}) for subject in fields["subjects"])
    return Scene(**{**fields, "subjects": subjects})


def latent_camera(scene: Scene, fmt: ClipFormat, stride: int) -> Tensor:
    """Camera per latent frame, (T, 7): position, rotation in radians, field of view in degrees, each the mean over the
    frames that the latent frame stands for."""
    path = camera_path(scene, fmt)
    frames = torch.cat([path.position, path.rotation, path.fov_deg[:, None]], 1)
    return torch.cat([frames[:1], frames[1:].unflatten(0, (-1, stride)).mean(1)])


@torch.no_grad()
def encode_clips(numbers: Sequence[int], spec: PoolSpec, codecs: Codecs, device: torch.device) -> dict[str, Tensor]:
    """Render, sound and encode these clips of a pool: the tensors of a shard but for the scenes, on the CPU."""
    fmt, stride = spec.fmt, codecs.video.strides.time
    scenes = [pool_scene(spec, number) for number in numbers]
    frames = render(scenes, fmt, device).movedim(2, 1).float() / 127.5 - 1.0
    # Encoding in half precision changes latents by far less than the noise they are trained with.
    with torch.autocast(device.type, torch.bfloat16):
        video = codecs.video.encode(frames)
    first = min(1, fmt.num_frames - 1)
    chosen = torch.tensor([first + derive_seed(spec.seed, "still", n) % (fmt.num_frames - first) for n in numbers])
    rows = torch.arange(len(scenes), device=device)
    held = frames[rows, :, chosen.to(device)][:, :, None].expand(-1, -1, 1 + stride, -1, -1)
    with torch.autocast(device.type, torch.bfloat16):
        still = codecs.video.encode(held)[:, :, -1]
        opening = codecs.video.encode(_gray_after_the_first(frames)) if spec.openings else None
    camera = torch.stack([latent_camera(scene, fmt, stride) for scene in scenes])
    return {
        "video": video.to("cpu", torch.bfloat16),
        "audio": codecs.audio.encode(_sound(scenes, spec, codecs.audio).to(device)).to("cpu", torch.bfloat16),
        "camera": camera,
        "still": still.to("cpu", torch.bfloat16),
        "still_frame": -(-chosen // stride),
        **({} if opening is None else {"opening": opening.to("cpu", torch.bfloat16)}),
    }


def _gray_after_the_first(frames: Tensor) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] of which the first frame alone is shown."""
    return torch.cat([frames[:, :, :1], torch.zeros_like(frames[:, :, 1:])], 2)


def _sound(scenes: Sequence[Scene], spec: PoolSpec, codec: AudioCodec) -> Tensor:
    """Samples (B, 1, N) of the scenes, with silence up to a whole number of latents and patches."""
    latents = num_audio_latents(spec.fmt.duration_s, codec.sample_rate_hz / codec.hop, spec.audio_patch)
    sound = synthesise_batch(scenes, spec.fmt)
    return torch.nn.functional.pad(sound, (0, latents * codec.hop - sound.shape[-1]))[:, None]


def pool_scene(spec: PoolSpec, number: int) -> Scene:
    """Scene `number` of a pool."""
    seed = derive_seed(spec.seed, "pool", spec.split, number)
    return draw_scene(seed, mix=spec.mix, split=spec.split, fmt=spec.fmt)


def build_shard(
    folder: Path, spec: PoolSpec, codecs: Codecs, device: torch.device, index: int, chunk: int = 16
) -> None:
    """Render, encode and write one shard. Raises CheckpointError when the disk refuses."""
    numbers = range(index * spec.shard_clips, (index + 1) * spec.shard_clips)
    parts = [encode_clips(numbers[i : i + chunk], spec, codecs, device) for i in range(0, len(numbers), chunk)]
    tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
    for name in ("video", "audio", "still", *(["opening"] if spec.openings else [])):
        if not torch.isfinite(tensors[name]).all():
            raise TrainingError(f"shard {index}: the codec gave {name} latents that are not finite")
    texts = [scene_to_json(pool_scene(spec, number)).encode() for number in numbers]
    tensors["scenes"] = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    tensors["scene_ends"] = torch.tensor([len(text) for text in texts]).cumsum(0)
    with atomic_file(_shard_path(folder, index)) as file:
        file.write(save(tensors, {"pool": spec.digest, "index": str(index)}))


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:05d}.safetensors"


def is_whole(folder: Path, spec: PoolSpec, index: int) -> bool:
    """Whether shard `index` is there and is one of this pool."""
    try:
        with safe_open(_shard_path(folder, index), "pt") as file:
            return file.metadata() == {"pool": spec.digest, "index": str(index)}
    except (OSError, SafetensorError):
        return False


def missing_shards(folder: Path, spec: PoolSpec) -> list[int]:
    """Shards that are still to be built."""
    return [index for index in range(spec.num_clips // spec.shard_clips) if not is_whole(folder, spec, index)]


@dataclass(frozen=True)
class Builder:
    """How a pool is built: each of `num_workers` processes loads the codecs on the device."""

    codecs: CodecFiles
    device: torch.device
    num_workers: int = 1


def build_pool(root: Path, spec: PoolSpec, builder: Builder, report: Callable[[int, int], None]) -> Path:
    """Build what is missing of a pool under `root`; return its folder. `report(clips there, clips in all)` as it grows.

    Idempotent: several calls, also after a crash, give the same content. Raises CheckpointError when the disk refuses.
    """
    folder = root / spec.digest
    with atomic_file(folder / "manifest.json") as file:
        file.write(json.dumps(spec.identity(), indent=1).encode() + b"\n")
    missing = missing_shards(folder, spec)
    workers = min(builder.num_workers, len(missing))
    build = _build_apart if workers > 1 else _build_here
    for left in build(folder, spec, builder, missing):
        report(spec.num_clips - left * spec.shard_clips, spec.num_clips)
    return folder


def _build_here(folder: Path, spec: PoolSpec, builder: Builder, indices: Sequence[int]) -> Iterator[int]:
    """Build these shards in this process; yields how many are left after each."""
    if indices:
        codecs = builder.codecs.load(builder.device)
        for built, index in enumerate(indices, start=1):
            build_shard(folder, spec, codecs, builder.device, index)
            yield len(indices) - built


def _build_apart(folder: Path, spec: PoolSpec, builder: Builder, indices: Sequence[int]) -> Iterator[int]:
    """Build these shards in several processes; yields how many are left, now and then. Closed early, it waits for the
    shards under way and begins no other."""
    executor = ProcessPoolExecutor(min(builder.num_workers, len(indices)), get_context("spawn"))
    try:
        running = {executor.submit(_build_one, folder, spec, builder, index) for index in indices}
        while running:
            done, running = wait(running, timeout=2.0, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            yield len(running)
    finally:
        executor.shutdown(cancel_futures=True)


def _build_one(folder: Path, spec: PoolSpec, builder: Builder, index: int) -> None:
    # Loading the codecs for each shard costs a hundredth of encoding it, and leaves nothing behind in the process.
    torch.set_num_threads(1)
    for _ in _build_here(folder, spec, builder, [index]):
        pass


class LatentPool:
    """The clips of a built pool, mapped from the disk; loader processes share the pages."""

    def __init__(self, folder: Path, spec: PoolSpec) -> None:
        missing = missing_shards(folder, spec)
        if missing:
            raise TrainingError(f"pool {folder} lacks {len(missing)} shards or they are of another pool")
        self.num_clips = spec.num_clips
        self._shard_clips = spec.shard_clips
        self._shards = [load_file(_shard_path(folder, index)) for index in range(spec.num_clips // spec.shard_clips)]

    def take(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The latents, cameras, stills and, where there are, openings of the clips with these numbers, stacked."""
        places = [divmod(number, self._shard_clips) for number in numbers]
        names = [name for name in self._shards[0] if not name.startswith("scene")]
        return {name: torch.stack([self._shards[s][name][row] for s, row in places]) for name in names}

    def scene(self, number: int) -> Scene:
        """The scene of a clip."""
        shard, row = divmod(number, self._shard_clips)
        ends = self._shards[shard]["scene_ends"]
        start = int(ends[row - 1]) if row else 0
        text = self._shards[shard]["scenes"][start : int(ends[row])]
        return scene_from_json(bytes(text.tolist()).decode())
