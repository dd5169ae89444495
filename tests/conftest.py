"""What all tests share: a hypothesis profile that does not depend on the speed of the machine, and a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "vitascope", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vitascope")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights: 32 x 32 px, 9 frames at 12 fps (windows share 5), strides 4, tokens of 8 px,
    3 steps, guidance 2."""
    import torch
    from torch import nn

    from vitascope.models import FAMILIES
    from vitascope.weights.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    levels = [
        {"channels": 8, "encoder_blocks": 1, "decoder_blocks": 1, "stride": stride}
        for stride in ([1, 1, 1], [2, 2, 2], [2, 1, 1])
    ]
    waves = [{"channels": 8, "stride": stride, "decoder_blocks": 1} for stride in (16, 20)]
    parts = {
        "video_codec": ("causal_video", {"latent_channels": 4, "patch_px": 2, "levels": levels, "preview_px": 2}),
        "audio_codec": ("waveform", {"latent_channels": 6, "levels": waves}),
        "text_encoder": ("bytes", {"width": 16, "depth": 1, "num_heads": 2, "byte_width": 8}),
        "denoiser": (
            "factorised",
            {"width": 32, "depth": 2, "num_heads": 2, "audio_width": 16, "audio_heads": 2, "text_width": 16}
            | {"video_channels": 4, "audio_channels": 6, "patch": [1, 2, 2]},
        ),
    }
    torch.manual_seed(0)
    for name, (family, config) in parts.items():
        model = FAMILIES[family].build(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        save_checkpoint(folder / f"{name}.safetensors", model.state_dict(), family, config)
    defaults = {
        "clip": {"width_px": 32, "height_px": 32, "num_frames": 9},
        "num_inference_steps": 3,
        "guidance": {"scale": 2.0},
        "overlap_frames": 5,
    }
    (folder / "pipeline.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(scope="session")
def silent_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders like that of the tiny model, without an audio codec and with a denoiser of another family: "mochi",
    "mochi_text" (where text sees text alone), "wan" and "ltx"."""
    import torch
    from torch import nn

    from vitascope.models import FAMILIES
    from vitascope.weights.checkpoint import save_checkpoint

    mochi = {"width": 24, "stream_width": 12, "num_heads": 2, "frequency_width": 16, "video_channels": 4, "area": 16.0}
    wan = {"width": 24, "num_heads": 2, "hidden": 32, "frequency_width": 16, "in_channels": 4, "out_channels": 4}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "mochi": ("mochi", mochi),
        "mochi_text": ("mochi", {**mochi, "text_sees": "text"}),
        "wan": ("wan", {**wan, "noise": "frame", "masked_text": True}),
        "ltx": ("ltx", {"width": 24, "num_heads": 2, "in_channels": 4, "out_channels": 4}),
    }
    folders = {}
    for name, (family, config) in configs.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        for part in ("video_codec.safetensors", "text_encoder.safetensors", "pipeline.json"):
            shutil.copy(tiny_model / part, folder)
        torch.manual_seed(0)
        config = {**config, "depth": 2, "text_width": 16}
        model = FAMILIES[family].build(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        save_checkpoint(folder / "denoiser.safetensors", model.state_dict(), family, config)
    return folders


@pytest.fixture(scope="session")
def text_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "t5" and "umt5" in the layout of diffusers: tiny random encoders in `text_encoder`, in shards, and
    `tokenizer`."""
    import torch
    from torch import nn
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    root = tmp_path_factory.mktemp("pipelines")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz.,<>&"]
    pieces += [(f"▁{word}", -3.0) for word in ("a", "red", "ball", "bounces", "wind")]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    sizes: dict[str, Any] = {"vocab_size": len(pieces), "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4}
    sizes |= {"num_layers": 2, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    for name, model in (
        ("t5", T5EncoderModel(T5Config(**sizes))),
        ("umt5", UMT5EncoderModel(UMT5Config(**sizes))),
    ):
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name / "text_encoder", max_shard_size="12KB")
        tokenizer.save_pretrained(root / name / "tokenizer")
    return root


@pytest.fixture(scope="session")
def in_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """Run a test file as a script in several processes, as torchrun would: `python FILE RESULT.json`, one thread each.

    Returns what each wrote to its RESULT.json. Fails when one of them does, or all together have not ended in time.
    """

    def run(file: str, count: int, timeout_s: float = 600.0, arguments: tuple[str, ...] = ()) -> list[Any]:
        folder = tmp_path_factory.mktemp("processes")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
        results = [folder / f"{rank}.json" for rank in range(count)]
        started: list[subprocess.Popen[bytes]] = []
        for rank, result in enumerate(results):
            own = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with result.with_suffix(".log").open("wb") as log:
                command = [sys.executable, file, str(result), *arguments]
                started.append(subprocess.Popen(command, env=own, stdout=log, stderr=log))
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.poll() is None for process in started) and time.monotonic() < deadline:
                if any(process.poll() for process in started):
                    break
                time.sleep(0.05)
        finally:
            codes = [process.poll() for process in started]
            for process in started:
                process.kill()
                process.wait()
        if any(code != 0 for code in codes):
            logs = "\n".join(result.with_suffix(".log").read_text()[-3000:] for result in results)
            pytest.fail(f"processes ended with {codes} (None: not within {timeout_s:g} s)\n{logs}", pytrace=False)
        return [json.loads(result.read_text()) for result in results]

    return run
