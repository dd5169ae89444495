"""Text encoders under a limit of memory: read layer by layer where the whole does not fit, with the same embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vitascope.core.errors import InputError
from vitascope.core.freed_memory import release_freed_memory, return_freed_memory
from vitascope.core.memory import held_bytes
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import TextContext
from vitascope.models.offload.offloaded import WHOLE, Layers
from vitascope.models.text.cache import CachedTextEncoder
from vitascope.models.text.t5.encoder import T5Files, open_t5
from vitascope.models.text.t5.options import T5Options
from vitascope.tasks.clips import Clips
from vitascope.tasks.fitting import Fitted, MemoryLimit
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.memory import MemoryPlan
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest
from vitascope.tasks.text_cost import text_cost, with_layers

MB = 10**6
CPU = torch.device("cpu")
REQUEST = GenerateRequest("a red ball", format=ClipFormat(32, 32, 12.0, 9), num_inference_steps=2)


@pytest.fixture(scope="module")
def large_text(text_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> T5Files:
    """umT5 of 8 layers of 17 MB, and 82 MB of a table of 40 thousand tokens."""
    from transformers import UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("large")
    sizes: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 8}
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(vocab_size=40_000, feed_forward_proj="gated-gelu", **sizes))
    model.save_pretrained(folder / "text_encoder", max_shard_size="60MB")
    return T5Files(folder / "text_encoder", text_folders / "umt5" / "tokenizer")


def reading(model: Path, files: T5Files, limit_mb: int, cache: Path | None = None, max_tokens: int = 64) -> Pipeline:
    """The tiny model under a limit for models alone, with a T5 that reads the prompts."""
    options = T5Options(max_tokens=max_tokens)

    def open_text(layers: Layers | None = None) -> CachedTextEncoder:
        return open_t5(files, options, cache=cache, dtype=torch.float32, layers=layers)

    pipeline = load_pipeline(str(model), "cpu", "fp32", memory=MemoryLimit(held_bytes(CPU) + 10**9))
    cost = with_layers(text_cost(files, options, torch.float32), files, torch.float32)
    release_freed_memory()
    limit = MemoryLimit(held_bytes(CPU) + limit_mb * MB)
    memory = Fitted(kept(pipeline).parts, CPU, limit, text=cost, open_text=open_text)
    return replace(pipeline, text_encoder=open_text(), memory=memory)


def kept(pipeline: Pipeline) -> Fitted:
    assert isinstance(pipeline.memory, Fitted)
    return pipeline.memory


def texts_of(pipeline: Pipeline, requests: Sequence[GenerateRequest]) -> tuple[MemoryPlan, TextContext, int]:
    """The plan for clips, the embeddings that it makes, and the measured peak of reading."""
    memory = kept(pipeline)
    fitted = memory.fit(pipeline, requests, True)
    release_freed_memory()
    with fitted.at_work("text_encoder", "text"):
        text = fitted.text_encoder([request.prompt for request in requests] + [""])
    assert memory.use is not None
    return memory.use.plan, text, memory.use.measured["text"]


def test_a_text_encoder_that_is_too_large_is_read_layer_by_layer(
    tiny_model: Path, large_text: T5Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    return_freed_memory()
    large = reading(tiny_model, large_text, 900, tmp_path / "whole")
    kept(large).fit(large, [REQUEST], True)  # what planning imports is there from now on
    plan, found, peak = texts_of(reading(tiny_model, large_text, 110, tmp_path / "layers"), [REQUEST])
    assert plan.text == Layers(0, group=2)
    assert "layers of the text encoder come 2 at a time, the next ones ahead of time" in plan.lines()[0]
    # two groups of layers of 17 MB at least; at most what was said
    assert 4 * 16 * MB < peak < plan.stages[0].total < 110 * MB
    plan, expected, _ = texts_of(large, [REQUEST])
    assert plan.text == WHOLE
    # of the table of tokens rows alone are read
    assert 130 * MB < plan.stages[0].weights < 140 * MB
    assert torch.equal(found.embeddings, expected.embeddings)
    # what is on the disk is read from there by whichever plan
    monkeypatch.setattr("vitascope.models.text.t5.encoder.load_t5", lambda *a, **k: pytest.fail("it was loaded"))
    plan, found, peak = texts_of(reading(tiny_model, large_text, 110, tmp_path / "whole"), [REQUEST])
    assert torch.equal(found.embeddings, expected.embeddings)
    assert peak < 30 * MB
    assert plan.stages[0].total < 2 * MB
    assert plan.stages[0].working == 2 * 2 * 64 * 512 * 4


def test_a_limit_that_not_even_one_layer_fits_is_refused(tiny_model: Path, large_text: T5Files) -> None:
    pipeline = reading(tiny_model, large_text, 40)
    with pytest.raises(InputError, match=r"the stage 'text' needs .* of weights, .* taken before\); give .* bf16"):
        texts_of(pipeline, [REQUEST])
    with pytest.raises(InputError, match="the stage 'text' needs"):
        pipeline.fill_texts(["a ball"])


def test_many_prompts_are_read_ahead_as_many_at_a_time_as_fit(
    tiny_model: Path, large_text: T5Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["", *(f"a {'red ' * n}ball" for n in range(121, 126))]
    # of prompts of up to 512 bytes, 3 are expected to take 118 MB at least, and 6 of them 195 MB
    pipeline = reading(tiny_model, large_text, 150, tmp_path, 512)
    assert isinstance(pipeline.text_encoder, CachedTextEncoder)
    read: list[int] = []
    fill = CachedTextEncoder.fill
    monkeypatch.setattr(CachedTextEncoder, "fill", lambda self, some: read.append(len(some)) or fill(self, some))
    pipeline.fill_texts(prompts)
    assert read == [3, 3]
    monkeypatch.setattr("vitascope.models.text.t5.encoder.load_t5", lambda *a, **k: pytest.fail("it was loaded"))
    _, found, peak = texts_of(pipeline, [replace(REQUEST, prompt=prompts[-1])])
    assert found.embeddings.any()
    assert 16 * MB < peak < 150 * MB  # that of reading ahead
    use = kept(pipeline).use
    assert use is not None
    stage = use.plan.stages[0]
    assert (stage.name, stage.weights > 16 * MB, use.plan.text != WHOLE) == ("text", True, True)
    assert peak < stage.total < 150 * MB


def test_what_a_tokeniser_takes_and_how_long_a_prompt_is_are_counted(tiny_model: Path, large_text: T5Files) -> None:
    plain = text_cost(large_text, T5Options(), torch.bfloat16)
    assert plain.weights == 2 * (40_000 * 512 + 8 * (4 * 512 * 512 + 3 * 512 * 2048 + 32 * 8 + 2 * 512) + 512)
    size = (large_text.tokenizer / "tokenizer.json").stat().st_size
    assert with_layers(plain, large_text, torch.bfloat16).tokenizer == 30 * size
    pipeline = reading(tiny_model, large_text, 900)
    working = []
    for longest in (10, 62, 500):
        stage = kept(pipeline)._costs(pipeline, Clips(REQUEST.format, longest=longest)).text()
        assert stage is not None
        working.append(stage.working)
    # at most the 64 tokens there may be are read
    assert working[0] < working[1] == working[2]
    assert working[0] > 30 * size
