"""`vitascope inspect` and `vitascope convert` on a small public model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from vitascope.cli.app import main
from vitascope.weights.sources import read_metadata


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LTX-Video pipeline as diffusers writes it, without a text encoder."""
    folder = tmp_path_factory.mktemp("ltx")
    torch.manual_seed(0)
    LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(4, 8, 16), decoder_block_out_channels=(4, 8, 16),
        layers_per_block=(1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), patch_size=4,
        spatio_temporal_scaling=(True, True, True), decoder_spatio_temporal_scaling=(True, True, True),
        decoder_inject_noise=(False,) * 4, downsample_type=("conv",) * 3, upsample_residual=(False,) * 3,
        upsample_factor=(1,) * 3, down_block_types=("LTXVideoDownBlock3D",) * 3,
    ).save_pretrained(folder / "vae")  # fmt: skip
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))
    return folder


def report_of(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_there_and_back(ltx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = report_of(ltx, capsys)
    assert (first["kind"], first["pipeline"]) == ("diffusers", "LTXPipeline")
    file, again = tmp_path / "ltx.safetensors", tmp_path / "again"
    assert main(["convert", str(ltx), str(file), "--layout", "original", "--dtype", "bf16"]) == 0
    single = report_of(file, capsys)
    assert (single["kind"], single["pipeline"]) == ("original", "LTXPipeline")
    assert [part["config"] for part in single["parts"]] == [part["config"] for part in first["parts"]]
    assert all(list(part["dtypes"]) == ["bfloat16"] for part in single["parts"])
    assert main(["convert", str(file), str(again), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert {Path(path).name for path in made["files"]} >= {"config.json", "model_index.json"}
    assert report_of(again, capsys)["parts"] == [{**part, "layout": "diffusers"} for part in single["parts"]]


def test_levels_that_the_layout_has_no_place_for_are_told(
    ltx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, distilled = tmp_path / "ltx.safetensors", tmp_path / "distilled.safetensors"
    assert main(["convert", str(ltx), str(file), "--layout", "original"]) == 0
    assert "note:" not in capsys.readouterr().err
    notes = json.loads(read_metadata(file)["config"]) | {"allowed_inference_steps": [0.725, 1.0, 0.9094]}
    save_file(load_file(file), distilled, {"config": json.dumps(notes)})
    assert main(["convert", str(distilled), str(tmp_path / "told")]) == 0
    told = capsys.readouterr().err
    assert "note: the levels that the model lists (1,0.9094,0.725) and its guidance scale 1" in told
    assert "--levels 1,0.9094,0.725 --guidance-scale 1 " in told
    assert "timesteps=[1000, 909.4, 725]" in told
    assert main(["convert", str(distilled), str(tmp_path / "json"), "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert f"note: {note}" in told
    # nothing is lost in the layout that lists them, nor of a model that lists none
    assert main(["convert", str(distilled), str(tmp_path / "same.safetensors"), "--layout", "original", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
    assert main(["convert", str(file), str(tmp_path / "plain"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_what_is_told_to_people(ltx: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ltx)]) == 0
    out = capsys.readouterr().out
    for text in ("LTXPipeline as diffusers writes it", "transformer: ltx", "vae: ltx_codec", "in fp8", "704x512"):
        assert text in out
    assert main(["inspect", str(ltx / "vae")]) == 0
    assert "one part of a model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "there is no model at nowhere"),
        (["convert", "{ltx}", "{new}", "--layout", "onnx"], "valid values: diffusers, original"),
        (["convert", "{ltx}", "{new}", "--dtype", "int3"], "valid values: keep, fp32, bf16, fp16"),
        (["convert", "{ltx}", "{ltx}"], "is there already: give a new place"),
        (["inspect", "{pickle}"], "is a pickle: allow it (--allow-pickle) if you trust"),
        (["inspect", "{cut}"], "is not a readable safetensors file"),
        (["inspect", "{other}"], "holds no model that is known; known: wan, ltx"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], message: str, ltx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (ltx / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    places = {name: tmp_path / name for name in ("new", "pickle.pth", "cut.safetensors", "other.safetensors")}
    torch.save({"a": torch.zeros(1)}, places["pickle.pth"])
    places["cut.safetensors"].write_bytes(weights[: len(weights) // 2])
    places["other.safetensors"].write_bytes(weights)
    names = {"ltx": ltx, **{name.partition(".")[0]: place for name, place in places.items()}}
    assert main([argument.format_map(names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_part_that_does_not_fit_is_told(ltx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(ltx / "transformer", tmp_path / "transformer")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    assert main(["inspect", str(copy)]) == 0
    assert "cannot be loaded: " in capsys.readouterr().out


def test_the_file_of_an_ltx_model_takes_the_place_of_none(
    ltx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "mine.safetensors"
    kept.write_bytes(b"mine")
    assert main(["convert", str(ltx), str(tmp_path / "mine"), "--layout", "original"]) == 2
    assert "mine.safetensors is there already" in capsys.readouterr().err
    assert kept.read_bytes() == b"mine"


def test_the_file_that_is_made_is_told(ltx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(ltx), str(tmp_path / "ltxv-0.9.8"), "--layout", "original", "--json"]) == 0
    told, made = json.loads(capsys.readouterr().out), tmp_path / "ltxv-0.9.8.safetensors"
    assert (told["output"], told["files"]) == (str(made), [str(made)])
    assert made.is_file()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("[" * 100_000, "has a damaged configuration: it is nested too deeply"),
        ({"transformer": [1]}, "transformer in the configuration of"),
        ({"scheduler": "x"}, "scheduler in the configuration of"),
        ({"scheduler": {"sampler": "Constant", "shift": "x"}}, "shift must be a number, got 'x'"),
        (
            {"scheduler": {"sampler": "Constant", "shift": 1e9}},
            "holds values that no such model has: 'math range error'",
        ),
        ({"scheduler": {"shifting": "SD3", "target_shift_terminal": "x"}}, "target_shift_terminal must be a number"),
        ({"transformer": {"positional_embedding_max_pos": [1]}}, "holds values that no such model has"),
        ({"transformer": {"positional_embedding_max_pos": ["a", "b", "c"]}}, "max_pos[0] must be a number, got 'a'"),
        ({"vae": {"decoder_blocks": [["compress_all", {"multiplier": 0}], ["res_x", 1]]}}, "holds values that no such"),
        ({"vae": {"encoder_blocks": [["res_x", {}]]}}, "the vae of"),
        ({"vae": {"encoder_blocks": [["res_x", {"num_layers": "x"}]]}}, "the vae of"),
    ],
)
def test_configurations_of_the_authors_that_cannot_be_are_refused(
    values: Any, words: str, ltx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ltx.safetensors"
    assert main(["convert", str(ltx), str(file), "--layout", "original"]) == 0
    notes = json.loads(read_metadata(file)["config"])
    if not isinstance(values, str):
        merged = {k: {**notes[k], **v} if isinstance(v, dict) and k != "scheduler" else v for k, v in values.items()}
        values = json.dumps(notes | merged)
    save_file(load_file(file), file, {"config": values})
    capsys.readouterr()
    assert main(["inspect", str(file)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
