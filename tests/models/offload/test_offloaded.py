"""Models whose layers come and go, against the same models left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, CheckpointError, InputError
from vitascope.core.tracks import TextContext, Track
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.mochi.model import MochiDenoiser
from vitascope.models.offload.offloaded import WHOLE, Layers, Offloaded, offload
from vitascope.models.offload.stores import FileStore, KeptStore, same_names
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.model import WanDenoiser
from vitascope.nn.storage import Narrow
from vitascope.weights.checkpoint import save_checkpoint
from vitascope.weights.sources import MemorySource, open_source

WAN = WanConfig(
    width=48, depth=5, num_heads=4, hidden=80, text_width=20, in_channels=4, out_channels=4, frequency_width=32
)
MOCHI = MochiConfig(
    width=48, stream_width=24, depth=3, num_heads=4, video_channels=4, text_width=32, frequency_width=16
)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "wan": lambda: WanDenoiser(WAN),
    "ltx": lambda: LTXDenoiser(LTXConfig(width=48, depth=4, num_heads=4, in_channels=4, out_channels=4, text_width=20)),
    "mochi": lambda: MochiDenoiser(MOCHI),
    "mochi, text sees text": lambda: MochiDenoiser(replace(MOCHI, text_sees="text")),
}
KINDS = {
    "whole": WHOLE,
    "each layer, prefetched": Layers(0),
    "each layer, not prefetched": Layers(0, prefetch=False),
    "groups of two": Layers(0, group=2),
    "two stay, the rest comes": Layers(2),
    "all in one group": Layers(0, group=99),
    "more stay than there are": Layers(99),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def given(model: Any, seed: int = 0) -> tuple[dict[str, Track], TextContext]:
    draw = torch.Generator().manual_seed(seed)
    words = torch.randn(1, 6, model.config.text_width, generator=draw)
    text = TextContext(words, torch.ones(1, 6, dtype=torch.bool))
    track = Track(torch.randn(1, 4, 2, 4, 6, generator=draw), torch.full((1, 1, 2, 1, 1), 0.5), torch.arange(2.0))
    with torch.no_grad():
        return {"video": track}, model.prepare(text)


def run(model: Any, seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model(*given(model, seed))["video"]


def on_disk(model: Any, folder: Path, layers: Layers = WHOLE) -> Offloaded:
    """The model without its weights, which lie in a file."""
    path = folder / "weights.safetensors"
    save_checkpoint(path, model.state_dict(), "any", {})
    with torch.device("meta"):
        bare: Any = type(model)(model.config).eval()
    source = open_source(path)
    return Offloaded(bare, FileStore(bare.state_dict(), source, same_names(source)), "cpu", layers, bare.regions)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_come_and_go_change_nothing(name: str, kind: str, tmp_path: Path) -> None:
    plain = model_of(name)
    model = on_disk(plain, tmp_path, KINDS[kind])
    model.bring()
    for seed in (0, 1):
        assert torch.equal(run(model.module, seed), run(plain, seed))
    there = [name for name, value in model.module.state_dict().items() if not value.is_meta]
    model.away()
    assert all(value.is_meta for value in model.module.state_dict().values())
    depth, kept = plain.config.depth, KINDS[kind].resident
    streamed = 0 if kept is None else max(0, depth - kept)
    # beside a block's layers, what it has itself stays
    blocks = {name.split(".")[1] for name in there if name.startswith("blocks.") and name.count(".") > 2}
    last = (streamed - 1) % KINDS[kind].group + 1 if streamed else 0
    assert len(blocks) == depth - streamed + last


@pytest.mark.parametrize("name", MODELS)
def test_the_signal_of_a_step_cache_is_there_while_layers_are_away(name: str, tmp_path: Path) -> None:
    """It may go by what the first block has, before that block runs."""
    plain = model_of(name)
    model = on_disk(plain, tmp_path, Layers(0, prefetch=False))
    model.bring()
    signals = []
    modules: list[Any] = [plain, model.module]
    for module in modules:
        state, passage = module.enter(*given(module))
        signals.append(passage.signal(state))
    torch.testing.assert_close(signals[1], signals[0], rtol=0, atol=0)


def test_a_model_in_memory_is_offloaded_changed_and_made_whole_again() -> None:
    plain, model = model_of("wan"), model_of("wan")
    held = offload(model, model.regions, "cpu", Layers(1, prefetch=False))
    assert model.blocks[4].feed_forward.rise.weight.is_meta
    assert torch.equal(run(model), run(plain))
    held.change(WHOLE)
    held.bring()
    assert not any(value.is_meta for value in model.state_dict().values())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(run(model), run(plain))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("storage", "tolerance"), [("bf16", 0.02), ("fp8", 0.15)])
def test_layers_in_fewer_bits_are_widened_one_by_one(name: str, storage: Any, tolerance: float) -> None:
    plain, model = model_of(name), model_of(name)
    held = offload(model, model.regions, "cpu", Layers(0, prefetch=False, storage=storage))
    wanted = run(plain)
    error = float((run(model) - wanted).norm() / wanted.norm())
    # a rounded weight is off by up to 2^-9 (bf16) and 2^-4 (fp8), half of it on average; the errors of a sum of many
    # products cancel, those of a few layers one after the other add up
    assert 0 < error < tolerance
    whole = held.weight_bytes().total
    small = held.device_bytes(held.layers)
    assert small < whole * {"bf16": 0.95, "fp8": 0.85}[storage]


def test_a_pass_that_fails_leaves_the_model_usable(tmp_path: Path) -> None:
    plain = model_of("wan")
    model = on_disk(plain, tmp_path, Layers(0))
    model.bring()

    def fail(module: nn.Module, inputs: object) -> None:
        raise RuntimeError("stop here")

    for block in (1, 4):
        hook = model.module.get_submodule(f"blocks.{block}").register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            run(model.module)
        hook.remove()
        assert torch.equal(run(model.module), run(plain))
    model.away()


class Breaks:
    """A store whose readings fail from some number on, until it is mended."""

    slow = True

    def __init__(self, inner: FileStore, good: int) -> None:
        self.inner, self.left = inner, good

    def transit_bytes(self, names: Iterable[str]) -> int:
        return self.inner.transit_bytes(names)

    def read(self, into: Mapping[str, Tensor]) -> None:
        self.left -= 1
        if self.left < 0:
            raise CheckpointError("the disk is gone")
        self.inner.read(into)


@pytest.mark.parametrize("good", [3, 40, 41, 43])
def test_weights_that_cannot_be_read_are_an_error_and_not_a_wrong_result(good: int, tmp_path: Path) -> None:
    plain = model_of("wan")
    model = on_disk(plain, tmp_path, Layers(0))
    assert isinstance(model.store, FileStore)
    broken = Breaks(model.store, good)
    model.store = broken
    with pytest.raises(CheckpointError, match="the disk is gone"):
        model.bring()
        for _ in range(9):
            run(model.module)
    broken.left = 10**6
    model.bring()
    assert torch.equal(run(model.module), run(plain))
    model.away()


def test_what_it_says_of_its_bytes_is_what_there_is(tmp_path: Path) -> None:
    plain = model_of("wan")
    model = on_disk(plain, tmp_path)
    sizes = model.weight_bytes()
    assert sizes.total == sum(value.numel() * value.element_size() for value in plain.state_dict().values())
    assert len(sizes.layers) == 5
    assert model.device_bytes(WHOLE) == sizes.total
    orders = [Layers(0, prefetch=False), Layers(0), Layers(1), Layers(2)]
    counted = [model.device_bytes(layers) for layers in orders]
    assert counted == sorted(counted)
    largest = max(4 * value.numel() for name, value in plain.state_dict().items() if name.startswith("blocks."))
    # padding of each weight to 64 bytes apart: two layers, and a weight on its way from the file
    assert counted[1] == pytest.approx(sizes.base + 2 * sizes.layers[0] + largest, rel=0.03)


def test_misuse_is_refused_in_one_line(tmp_path: Path) -> None:
    plain = model_of("wan")
    with pytest.raises(InputError, match="valid values: as_is, bf16, fp8"):
        Layers(storage="int3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="group must be at least 1"):
        Layers(group=0)
    with pytest.raises(InputError, match="give prefetch=False"):
        Layers(0, storage="fp8")
    store = KeptStore({name: Narrow(value) for name, value in plain.state_dict().items()})
    with pytest.raises(InputError, match="Linear is not a part of WanDenoiser"):
        Offloaded(plain, store, "cpu", regions=[nn.Linear(1, 1)])
    plain.blocks[0].compile()
    with pytest.raises(CapabilityError, match="cannot be compiled"):
        Offloaded(plain, store, "cpu", regions=plain.regions)
    with pytest.raises(CheckpointError, match="1 weights missing"):
        FileStore(["a", "b"], MemorySource({"a": torch.zeros(1)}), same_names(MemorySource({"a": torch.zeros(1)})))
    wrong = MemorySource({"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"a has the shape \(2,\), expected \(1,\)"):
        FileStore(["a"], wrong, same_names(wrong)).read({"a": torch.zeros(1)})
