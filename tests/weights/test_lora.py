"""Files of LoRAs: what each name means, and one clear refusal for everything that is no plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from vitascope.core.errors import CheckpointError
from vitascope.weights.lora import Difference, Lora, LowRank, Target, read_lora
from vitascope.weights.lora_settings import METADATA_KEY, SETTINGS_FILE, settings_from

DOWN, UP = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)


def read(folder: Path, tensors: dict[str, Tensor], settings: Any = None) -> Lora:
    metadata = {"format": "pt"} if settings is None else {METADATA_KEY: json.dumps(settings)}
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(own, folder / "x.safetensors", metadata)
    return read_lora(folder / "x.safetensors")


def pair(layer: str = "a.b", down: Tensor = DOWN, up: Tensor = UP) -> dict[str, Tensor]:
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def only(lora: Lora) -> LowRank:
    update = lora.updates[Target("a.b")]
    assert isinstance(update, LowRank)
    return update


PREFIXES = (
    "",
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "pipe.dit.",
    "model.",
)
ENDINGS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.my-style.weight", "lora_B.my-style.weight"),
    ("lora_A", "lora_B"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
)


@pytest.mark.parametrize("prefix", [*PREFIXES, "base_model.model.transformer.", "module.model."])
@pytest.mark.parametrize("ending", ENDINGS)
def test_names_of_factors_and_layers(prefix: str, ending: tuple[str, str], tmp_path: Path) -> None:
    tensors = {f"{prefix}a.b.{ending[0]}": DOWN, f"{prefix}a.b.{ending[1]}": UP}
    lora = read(tmp_path, tensors)
    assert set(lora.updates) == {Target("a.b")}
    assert torch.equal(only(lora).down, DOWN)
    assert torch.equal(only(lora).up, UP)
    assert only(lora).scale == 1.0
    assert torch.equal(only(lora).delta(torch.device("cpu")), UP @ DOWN)
    scaled = read(tmp_path, tensors | {f"{prefix}a.b.alpha": torch.tensor(5)})
    assert only(scaled).scale == 2.5


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_"])
def test_names_with_underscores_are_left_to_the_model(prefix: str, tmp_path: Path) -> None:
    lora = read(tmp_path, {f"{prefix}a_0_b.lora_down.weight": DOWN, f"{prefix}a_0_b.lora_up.weight": UP})
    assert set(lora.updates) == {Target("a_0_b", flat=True)}


def test_differences_and_biases(tmp_path: Path) -> None:
    tensors = {"a.diff": DOWN, "a.diff_b": UP[0], "a.diff_m": UP, **pair(), "a.b.alpha": torch.tensor([4.0])}
    lora = read(tmp_path, tensors | {"a.b.lora_B.bias": torch.ones(4)})
    values = {target: update.values for target, update in lora.updates.items() if isinstance(update, Difference)}
    assert torch.equal(values[Target("a")], DOWN)
    assert torch.equal(values[Target("a", "bias")], UP[0])
    assert torch.equal(values[Target("a", "modulation")], UP)
    assert torch.equal(values[Target("a.b", "bias")], 2 * torch.ones(4))  # a bias of the factors goes with their scale
    assert len(lora.updates) == 5


def test_factors_of_a_kernel(tmp_path: Path) -> None:
    down, up = torch.randn(2, 3, 1, 2, 2), torch.randn(4, 2, 1, 1, 1)
    update = only(read(tmp_path, pair("a.b", down, up)))
    expected = torch.einsum("or,rcthw->octhw", up[..., 0, 0, 0], down)
    torch.testing.assert_close(update.delta(torch.device("cpu")), expected)


SETTINGS: dict[str, Any] = {"r": 2, "lora_alpha": 3, "peft_type": "LORA", "target_modules": ["b"], "use_dora": False}


@pytest.mark.parametrize(
    ("extra", "scale"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 3 / 2**0.5),
        ({"alpha_pattern": {"b": 8}}, 4.0),
        ({"alpha_pattern": {"^b": 8, "c": 9}}, 1.5),  # the name does not begin with b
        ({"alpha_pattern": {"^a.b": 8}}, 4.0),
        ({"alpha_pattern": {".*b": 7, "b": 8}}, 3.5),  # the first that fits
        ({"r": 5, "rank_pattern": {"a.b": 2}}, 1.5),
        ({"r": 5, "rank_pattern": {"a.b": 2}, "alpha_pattern": {"a.b": 1}, "use_rslora": True}, 1 / 2**0.5),
    ],
)
def test_settings_in_a_folder_and_in_the_head(extra: dict[str, Any], scale: float, tmp_path: Path) -> None:
    values = SETTINGS | extra
    assert only(read(tmp_path, pair(), values)).scale == pytest.approx(scale)
    prefixed = {f"transformer.{key}": value for key, value in values.items()} | {"text_encoder.r": 77}
    assert only(read(tmp_path, pair(), prefixed)).scale == pytest.approx(scale)
    assert only(read(tmp_path, pair(), {"text_encoder.r": 77})).scale == 1.0  # says nothing of the denoiser
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(pair(), folder / "adapter_model.safetensors")
    (folder / SETTINGS_FILE).write_text(json.dumps(values))
    for place in (folder, folder / "adapter_model.safetensors"):
        lora = read_lora(place)
        assert only(lora).scale == pytest.approx(scale)
        assert [file.name for file in lora.files] == ["adapter_model.safetensors", SETTINGS_FILE]


@pytest.mark.parametrize(
    "pattern",
    ["transformer.blocks.0.q", "^transformer.blocks.0.q", "blocks.0.q", "^blocks.0.q", "q", "former.blocks.0.q"],
)
@pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match:RuntimeWarning")
def test_patterns_are_for_the_names_that_peft_saw(pattern: str, tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    trained = nn.Module()
    trained.transformer = nn.Module()
    trained.transformer.blocks = nn.ModuleList([Block()])
    patterns: Any = {"alpha_pattern": {pattern: 32}, "rank_pattern": {pattern: 2}}
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q", "k"], **patterns)
    model: Any = get_peft_model(trained, config)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    for name in ("q", "k"):
        theirs = getattr(trained.get_submodule("transformer.blocks.0"), name).scaling["default"]
        update = lora.updates[Target(f"blocks.0.{name}")]
        assert isinstance(update, LowRank)
        assert update.scale == theirs


def test_patterns_of_other_files_are_for_names_with_and_without_prefix(tmp_path: Path) -> None:
    tensors = {f"transformer.{name}": tensor for name, tensor in pair().items()}
    for pattern in ("^a.b", "^transformer.a.b"):
        several = {pattern: 8, "b": 7}  # the first that fits
        assert only(read(tmp_path, tensors, SETTINGS | {"alpha_pattern": several})).scale == 4.0


@given(st.integers(1, 8), st.floats(-100, 100), st.booleans())
def test_the_scale_is_alpha_by_rank_or_its_root(rank: int, alpha: float, by_root: bool) -> None:
    settings = settings_from({"r": rank, "lora_alpha": alpha, "use_rslora": by_root}, "x")
    assert settings.scale("a", rank) * (rank**0.5 if by_root else rank) == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"r": 4}, "a.b has rank 2, the settings say 4"),
        ({"rank_pattern": {"b": 4}}, "a.b has rank 2, the settings say 4"),
        ({"r": 0}, "r must be a whole number above 0, got 0"),
        ({"r": "2"}, "r must be a whole number above 0, got '2'"),
        ({"r": True}, "r must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
        ({"lora_alpha": "3"}, "lora_alpha must be a number, got '3'"),
        ({"alpha_pattern": {"b": [1]}}, r"alpha_pattern of b must be a number, got \[1\]"),
        ({"alpha_pattern": {"b": float("nan")}}, "alpha_pattern of b must be a number, got nan"),
        ({"rank_pattern": 3}, "rank_pattern must be an object, got 3"),
        ({"rank_pattern": {"(": 2}}, r"'\(' is not a pattern of names"),
        ({"use_dora": True}, "is of a DoRA; only plain LoRAs"),
        ({"peft_type": "LOHA"}, "is of a LOHA; only plain LoRAs"),
        ({"alora_invocation_tokens": [1]}, "is of a aLoRA"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the model itself"),
    ],
)
def test_settings_that_do_not_fit_are_refused(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, pair(), SETTINGS | extra)
    assert METADATA_KEY in str(caught.value)
    assert "\n" not in str(caught.value)


def test_alpha_said_twice_must_agree(tmp_path: Path) -> None:
    assert only(read(tmp_path, pair() | {"a.b.alpha": torch.tensor(3.0)}, SETTINGS)).scale == 1.5
    rounded = torch.tensor(0.3, dtype=torch.bfloat16)
    assert only(read(tmp_path, pair() | {"a.b.alpha": rounded}, SETTINGS | {"lora_alpha": 0.3})).scale == 0.15
    with pytest.raises(CheckpointError, match=r"a\.b has alpha 4, the settings say 3"):
        read(tmp_path, pair() | {"a.b.alpha": torch.tensor(4.0)}, SETTINGS)


def test_damaged_settings_are_refused(tmp_path: Path) -> None:
    for text in ("{", "[1]"):
        save_file(pair(), tmp_path / "x.safetensors", {METADATA_KEY: text})
        with pytest.raises(CheckpointError, match=METADATA_KEY):
            read_lora(tmp_path / "x.safetensors")
        save_file(pair(), tmp_path / "adapter_model.safetensors")
        (tmp_path / SETTINGS_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=SETTINGS_FILE):
            read_lora(tmp_path / "adapter_model.safetensors")


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "half a pair": ({"a.b.lora_A.weight": DOWN}, r"a.b has half of a pair; lora_B \(lora_up\) is missing"),
    "other half": ({"a.b.lora_up.weight": UP}, r"a.b has half of a pair; lora_A \(lora_down\) is missing"),
    "ranks": (pair(up=UP[:, :1]), r"factors of a.b have no rank in common: \(4, 1\) and \(2, 3\)"),
    "rank 0": (pair("a.b", DOWN[:0], UP[:, :0]), "no rank in common"),
    "vectors": (pair("a.b", DOWN[0], UP), "no rank in common"),
    "wide kernel": (pair("a.b", DOWN, torch.ones(4, 2, 3)), "no rank in common"),
    "alpha alone": ({"a.b.alpha": torch.tensor(1.0), **pair("a.c")}, "a.b has alpha without a pair"),
    "bias alone": ({"a.b.lora_B.bias": torch.ones(4)}, "a.b has up_bias without a pair"),
    "two alphas": (pair() | {"a.b.alpha": torch.ones(2)}, r"alpha of a.b is no number: \[1.0, 1.0\]"),
    "no alpha": (pair() | {"a.b.alpha": torch.tensor(float("nan"))}, r"alpha of a.b is no number: \[nan\]"),
    "no values": (pair(up=UP / 0), "up of a.b holds values that are no finite numbers"),
    "integers": ({"a.b.diff": torch.ones(2, dtype=torch.int32)}, "diff of a.b holds values that are no finite"),
    "DoRA": (pair() | {"a.b.dora_scale": UP}, r"is of the kind DoRA \(a.b.dora_scale\); only plain LoRAs are known"),
    "DoRA of PEFT": (pair() | {"a.b.lora_magnitude_vector.weight": UP}, "is of the kind DoRA"),
    "LoHa": ({"a.hada_w1_a": UP}, "is of the kind LoHa"),
    "LoKr": ({"lycoris_a.lokr_w1": UP}, "is of the kind LoKr"),
    "LoCon": (pair() | {"a.b.lora_mid.weight": UP}, "LoCon"),
    "reshaping": (pair() | {"a.b.reshape_weight": UP}, "reshapes"),
    "a model": ({"a.b.weight": UP, "a.b.bias": UP[0]}, r"holds 2 tensors that no LoRA has \(a.b.\w+, a.b.\w+\)"),
    "two prefixes": (pair() | pair("transformer.a.b"), "two of a kind for one layer: .*a.b.lora"),
    "two adapters": (
        pair() | {"a.b.lora_A.second.weight": DOWN, "a.b.lora_B.second.weight": UP},
        "two of a kind for one layer",
    ),
    "sum of two": (pair() | {"a.b.diff": UP}, "adds to the weight of a.b twice"),
    "empty": ({}, "adds nothing to a denoiser: it is empty"),
    "text alone": (pair("text_encoder.a.b"), "adds nothing to a denoiser: all its 2 tensors are for the text encoder"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_plain_lora_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    tensors, message = BAD[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, tensors)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prefix", ["text_encoder.", "text_encoder_2.", "text_encoders.t5.", "lora_te_", "lora_te1_", "te."]
)
def test_tensors_for_the_text_encoder_are_counted(prefix: str, tmp_path: Path) -> None:
    lora = read(tmp_path, pair() | pair(f"{prefix}a"))
    assert set(lora.updates) == {Target("a.b")}
    assert lora.left_out == 2


def test_files_and_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nothing"):
        read_lora(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no LoRA: no adapter_model\.safetensors or pytorch_lora"):
        read_lora(tmp_path)
    torch.save(pair(), tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"no safetensors but the pickle adapter_model\.bin: convert it"):
        read_lora(tmp_path)
    with pytest.raises(CheckpointError, match="is a pickle: allow it"):
        read_lora(tmp_path / "adapter_model.bin")
    assert set(read_lora(tmp_path / "adapter_model.bin", allow_pickle=True).updates) == {Target("a.b")}
    for name in ("one", "two"):
        save_file(pair(), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several LoRAs, name one: one\.safetensors, two\.safetensors"):
        read_lora(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    assert read_lora(tmp_path).files == (tmp_path / "one.safetensors",)
    data = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "one.safetensors").write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match=r"one\.safetensors"):
        read_lora(tmp_path / "one.safetensors")
