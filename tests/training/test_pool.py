"""Pools of encoded clips: named by their content, built whole or not at all, the same however often they are built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from vitascope.core.errors import InputError, TrainingError
from vitascope.core.shapes import ClipFormat
from vitascope.training.codecs import CodecFiles
from vitascope.training.pool import (
    Builder,
    LatentPool,
    PoolSpec,
    build_pool,
    build_shard,
    code_fingerprint,
    encode_clips,
    latent_camera,
    missing_shards,
    pool_scene,
    scene_from_json,
    scene_to_json,
    world_hash,
)
from vitascope.world.camera import camera_path
from vitascope.world.casting import SceneMix, draw_scene

CPU = torch.device("cpu")
SPEC = PoolSpec({"video_codec": "a", "audio_codec": "b"}, SceneMix(), ClipFormat(), num_clips=512)


def build(root: Path, spec: PoolSpec, files: CodecFiles, num_workers: int = 1) -> tuple[Path, list[tuple[int, int]]]:
    reports: list[tuple[int, int]] = []
    folder = build_pool(root, spec, Builder(files, CPU, num_workers), lambda *counts: reports.append(counts))
    return folder, reports


def contents(folder: Path) -> dict[str, Any]:
    """Files by name: tensors, metadata (which safetensors writes in any order) and text."""
    found: dict[str, Any] = {"manifest.json": (folder / "manifest.json").read_text()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found[path.name] = (file.metadata(), tensors)
    assert len(found) == len(list(folder.iterdir()))
    return found


def test_building_goes_on_where_it_was_and_ends_with_the_same_content(
    tmp_path: Path, pool_spec: PoolSpec, codec_files: CodecFiles
) -> None:
    folder, reports = build(tmp_path, pool_spec, codec_files)
    assert reports == [(3, 6), (6, 6)]
    assert folder == tmp_path / pool_spec.digest
    whole = contents(folder)
    assert set(whole) == {"manifest.json", "shard_00000.safetensors", "shard_00001.safetensors"}
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard*")}
    assert build(tmp_path, pool_spec, codec_files) == (folder, [])
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("shard*")} == times
    # a shard cut short by a crash and one that was never written; the other stays as it is
    shard = folder / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert missing_shards(folder, pool_spec) == [0]
    assert build(tmp_path, pool_spec, codec_files)[1] == [(6, 6)]
    (folder / "shard_00001.safetensors").unlink()
    assert build(tmp_path, pool_spec, codec_files)[1] == [(6, 6)]
    assert contents(folder) == whole


def test_a_pool_grows_and_a_shard_of_another_pool_is_not_taken(
    tmp_path: Path, pool_spec: PoolSpec, codec_files: CodecFiles
) -> None:
    small, grown = replace(pool_spec, num_clips=3), pool_spec
    folder, _ = build(tmp_path, small, codec_files)
    with pytest.raises(TrainingError, match="lacks 1 shards"):
        LatentPool(folder, grown)
    assert build(tmp_path, grown, codec_files) == (folder, [(6, 6)])
    other = replace(pool_spec, seed=5)
    assert missing_shards(folder, other) == [0, 1]
    with pytest.raises(TrainingError, match="of another pool"):
        LatentPool(folder, other)


def test_what_is_taken_is_what_was_encoded(tmp_path: Path, pool_spec: PoolSpec, codec_files: CodecFiles) -> None:
    folder, _ = build(tmp_path, pool_spec, codec_files)
    pool = LatentPool(folder, pool_spec)
    expected = encode_clips(range(3, 6), pool_spec, codec_files.load(CPU), CPU)
    taken = pool.take([3, 4, 5])
    assert taken.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(taken[name], value), name
    assert {name: tuple(value.shape) for name, value in taken.items()} == {
        "video": (3, 4, 3, 8, 8),
        "audio": (3, 6, 40),  # 0.75 s at 50 latents a second in patches of 4
        "camera": (3, 3, 7),
        "still": (3, 4, 8, 8),
        "still_frame": (3,),
    }
    assert torch.equal(pool.take([5, 0, 5])["video"][0], taken["video"][2])
    assert [pool.scene(number) for number in range(6)] == [pool_scene(pool_spec, number) for number in range(6)]
    assert taken["still_frame"].min() >= 1  # frame 0 is a still of its own already
    assert taken["still_frame"].max() <= 2


@pytest.mark.slow
def test_several_processes_build_the_same_files(tmp_path: Path, pool_spec: PoolSpec, codec_files: CodecFiles) -> None:
    alone, _ = build(tmp_path / "one", pool_spec, codec_files)
    shared, reports = build(tmp_path / "two", pool_spec, codec_files, num_workers=2)
    assert reports[-1] == (6, 6)
    assert contents(shared) == contents(alone)


def test_latents_that_are_not_finite_are_refused(tmp_path: Path, pool_spec: PoolSpec, codec_files: CodecFiles) -> None:
    codecs = codec_files.load(CPU)
    codecs.video.latent_std.zero_()  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="shard 1: the codec gave video latents that are not finite"):
        build_shard(tmp_path, pool_spec, codecs, CPU, 1)
    assert not list(tmp_path.iterdir())


def test_the_name_follows_from_the_content_and_not_from_the_count() -> None:
    assert replace(SPEC, num_clips=1024).digest == SPEC.digest
    others = [
        replace(SPEC, seed=1),
        replace(SPEC, split="held_out"),
        replace(SPEC, weights={**SPEC.weights, "video_codec": "c"}),
        replace(SPEC, mix=SceneMix(face=0.2)),
        replace(SPEC, fmt=ClipFormat(num_frames=29)),
        replace(SPEC, shard_clips=128),
        replace(SPEC, audio_patch=2),
    ]
    assert len({SPEC.digest, *(spec.digest for spec in others)}) == 1 + len(others)
    assert SPEC.identity()["world"] == world_hash()


def test_scenes_do_not_depend_on_the_shards() -> None:
    other = replace(SPEC, shard_clips=64, num_clips=64)
    assert [pool_scene(SPEC, n) for n in range(5)] == [pool_scene(other, n) for n in range(5)]
    assert pool_scene(SPEC, 0) != pool_scene(replace(SPEC, split="held_out"), 0)


def test_clips_that_do_not_fill_shards_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="500 clips do not fill shards of 256; nearest: 256, 512"):
        replace(SPEC, num_clips=500)
    with pytest.raises(InputError, match="nearest"):
        replace(SPEC, num_clips=0)


def test_comments_and_docstrings_do_not_change_the_world() -> None:
    code = "def f(x):\n    return x + 1\n"
    same = '"""Module."""\ndef f(x):  # why\n    """What."""\n\n    return (x +\n        1)\n'
    assert code_fingerprint(code) == code_fingerprint(same)
    assert code_fingerprint(code) != code_fingerprint(code.replace("+ 1", "+ 2"))
    assert code_fingerprint('x = "a"') != code_fingerprint('x = "b"')


@given(st.integers(0, 2**40))
def test_scenes_survive_json(seed: int) -> None:
    scene = draw_scene(seed, mix=SceneMix(two_subjects=0.5, face=0.5))
    text = scene_to_json(scene)
    assert "\n" not in text
    assert scene_from_json(text) == scene


@given(st.integers(0, 1000), st.integers(1, 4))
def test_cameras_are_means_over_the_frames_of_a_latent(seed: int, stride: int) -> None:
    fmt = ClipFormat(num_frames=1 + 3 * stride)
    scene = draw_scene(seed, mix=SceneMix(camera=1.0), fmt=fmt)
    path = camera_path(scene, fmt)
    camera = latent_camera(scene, fmt, stride)
    assert camera.shape == (4, 7)
    torch.testing.assert_close(camera[0, :3], path.position[0])
    torch.testing.assert_close(camera[1, 3:6], path.rotation[1 : 1 + stride].mean(0))
    torch.testing.assert_close(camera[3, 6], path.fov_deg[-stride:].mean())
