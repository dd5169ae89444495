"""Wrong public models and files beside them, through the command: one line that names what is wrong, exit code 2, and
nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitascope.tasks.convert as conversion
from vitascope.cli.app import main

DENOISER = "transformer/diffusion_pytorch_model.safetensors"
CODEC = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model-00001-of-00002.safetensors"
TABLE = "text_encoder/model.safetensors.index.json"
QUERY, ROWS = "blocks.0.attn1.to_q.weight", "blocks.1.ffn.net.2.weight"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory, text_folders: Path) -> Path:
    """A small Wan 2.1 as diffusers writes it."""
    folder = tmp_path_factory.mktemp("wan") / "model"
    shutil.copytree(text_folders / "umt5", folder)
    torch.manual_seed(0)
    denoiser = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=40, num_layers=2
    )
    for name, part in ((DENOISER, denoiser), (CODEC, AutoencoderKLWan(base_dim=8, num_res_blocks=1))):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.2)
        part.save_pretrained((folder / name).parent)
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
        folder / "scheduler"
    )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "vae": ["diffusers", "A"]}))
    return folder


@pytest.fixture
def generated(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """The exit code of `vitascope generate` with a changed copy of the model, and its stderr. Nothing may be written
    by a run that was refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(change: Change = lambda folder: None, *arguments: object) -> tuple[int, str]:
        folder, output = shutil.copytree(wan, tmp_path / "model"), tmp_path / "clip.mp4"
        change(folder)
        small = ["--width", "48", "--height", "32", "--num-frames", "5", "--num-inference-steps", "2"]
        words = ["a red ball", "--model", folder, "--output", output, "--device", "cpu", "--precision", "fp32", *small]
        capfd.readouterr()
        code = main(["generate", *map(str, [*words, *arguments])])
        out, error = capfd.readouterr()
        assert output.exists() is (code == 0)
        assert out == ""
        shutil.rmtree(folder)
        return code, error

    return run


def values(name: str, **changes: Any) -> Change:
    """Values of a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def content(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def tensors(name: str, change: Callable[[Tensor], Tensor], key: str = "") -> Change:
    """The tensor `key` of a file, or all of them."""

    def apply(folder: Path) -> None:
        held = load_file(folder / name)
        save_file({n: change(t) if n == key or not key else t for n, t in held.items()}, folder / name)

    return apply


def added(name: str, **more: Tensor) -> Change:
    return lambda folder: save_file(load_file(folder / name) | more, folder / name)


def link_to_nothing(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/nowhere/blob")

    return apply


def nothing(tensor: Tensor) -> Tensor:
    return tensor * float("nan")


def whole(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int8)


WRONG: dict[str, tuple[Change, str]] = {
    # weights
    "not a number": (tensors(DENOISER, nothing, ROWS), "gives no finite numbers at step 1 of 2: its weights may be"),
    "infinite": (tensors(DENOISER, lambda t: t + float("inf"), ROWS), "gives no finite numbers"),
    "codec not a number": (
        tensors(CODEC, nothing, "decoder.conv_out.weight"),
        "the codec gives frames that are no fin",
    ),
    "text not a number": (tensors(TEXT, nothing), "the text encoder gives no finite numbers"),
    "int8": (tensors(DENOISER, whole, ROWS), "is of int8; quantised weights are not read: give fp32, bf16 or fp16"),
    "int8 in part": (tensors(DENOISER, whole, QUERY), "whole numbers among weights, as where some were quantised"),
    "text int8": (tensors(TEXT, whole), "is of int8; quantised weights"),
    "no axes": (tensors(DENOISER, lambda t: t.flatten()[0].clone(), QUERY), "shapes that do not go together"),
    "unknown text": (added(TEXT, foo=torch.zeros(1)), "1 weights of another model (foo)"),
    # files
    "empty": (content(DENOISER, b""), "is not a readable safetensors file: it is empty; fetch it again"),
    "web page": (content(DENOISER, b"<html>not found</html>"), "it is a web page; fetch it again"),
    "git-lfs": (content(CODEC, b"version https://git-lfs.github.com/spec/v1\noid"), "it is a pointer of git-lfs"),
    "lost link": (link_to_nothing(DENOISER), "is a link that leads to nothing: fetch it again"),
    "lost shard": (link_to_nothing(TEXT), "is a link to nothing in"),
    "lost index": (gone(TABLE), "there are shards, but their index model.safetensors.index.json is missing"),
    "empty index": (values(TABLE, weight_map={}), "it names no tensors"),
    # configurations
    "nested": (content("model_index.json", b"[" * 100_000), "nested too deeply"),
    "twice": (content("scheduler/scheduler_config.json", b'{"flow_shift": 3, "flow_shift": 5}'), "is given twice"),
    "not UTF-8": (content("vae/config.json", b'{"a": "\xff"}'), "it is not JSON in UTF-8"),
    "list of texts": (
        values("transformer/config.json", patch_size=["a", 2, 2]),
        "patch_size[0] must be a whole number",
    ),
    "text for a number": (
        values("transformer/config.json", image_dim="x"),
        "image_dim must be a whole number, got 'x'",
    ),
    "no number": (values("transformer/config.json", eps=float("nan")), "eps must be a number, got nan"),
    "below 0": (values("transformer/config.json", eps=-1.0), "eps of -1.0 is out of all bounds"),
    "too large": (values("transformer/config.json", ffn_dim=10**400), "a number of 401 digits"),
    "too deep": (values("transformer/config.json", num_layers=10**7), "speaks of 10000000 layers, the weights have"),
    "no class": (values("vae/config.json", _class_name=None), "does not say what it holds (_class_name"),
    "shift": (values("scheduler/scheduler_config.json", flow_shift=-1.0), "scheduler_config.json: the shift of a"),
    "text sizes": (values("text_encoder/config.json", d_ff="x"), "d_ff must be a whole number, got 'x'"),
    "text layers": (values("text_encoder/config.json", num_layers="x"), "text_encoder cannot be loaded: "),
    "many text layers": (values("text_encoder/config.json", num_layers=10**7), "speaks of num_layers 10000000"),
    "no transformer": (lambda folder: shutil.rmtree(folder / "transformer"), "holds no transformer; a model of family"),
    # other models
    "Wan 2.2": (values("model_index.json", transformer_2=["diffusers", "X"]), "with transformer_2 is not known; known"),
    "Wan 2.2, by its boundary": (values("model_index.json", boundary_ratio=0.9), "boundary_ratio is 0.9; only None is"),
    "Wan 2.2, 5B": (values("model_index.json", expand_timesteps=True), "expand_timesteps is True; only False is known"),
    "no pipeline": (values("model_index.json", _class_name=None), "does not say which pipeline it is"),
    "T5": (values("text_encoder/config.json", model_type="t5"), "a text encoder of type t5; umt5 belongs there"),
    # tokenisers
    "no words": (gone("tokenizer/tokenizer.json"), "has no words: neither tokenizer.json nor spiece.model is there"),
    "no marks": (gone("tokenizer/tokenizer_config.json"), "lacks its end or padding mark: tokenizer_config.json"),
    "more vectors": (
        values("text_encoder/config.json", vocab_size=30),
        "is of another encoder: it has 40 tokens, the",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_is_not_right_is_refused_in_one_line(name: str, generated: Any) -> None:
    change, words = WRONG[name]
    code, error = generated(change)
    assert words in error
    assert code == 2
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-frames", "165"], "at most 81 frames (5.062 s at 16 fps) and goes on from none"),
        (["--text-encoder", "nowhere"], "there is no folder nowhere"),
        (["--lora", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["--stg-layers", "1"], "--stg-layers and --stg-by go with --stg-scale"),
        (["--upsampler", "nowhere"], "there is no folder nowhere"),
        (["--upsampler", __file__], "is a file, not a folder with config.json"),
        (["--model", ""], "the model has no name"),
        (["--decode-timestep", "0.1"], "leave decode_timestep and decode_noise_scale away"),
        (["--decode-noise-scale", "2"], "lies in [0, 1], got 2"),
        (["--model", "models/wan.safetensors"], "there is no model at models/wan.safetensors"),
    ],
)
def test_options_that_are_not_right_are_refused_in_one_line(arguments: list[str], words: str, generated: Any) -> None:
    code, error = generated(lambda folder: None, *arguments)
    assert words in error
    assert code == 2
    assert error.count("\n") == 1


def test_fp8_beside_fp32_and_a_pickled_lora_are_read(generated: Any, tmp_path: Path) -> None:
    assert generated(tensors(DENOISER, lambda t: t.to(torch.float8_e4m3fn), QUERY))[0] == 0
    (tmp_path / "clip.mp4").unlink()
    factors = {"lora_A": torch.ones(2, 24), "lora_B": torch.ones(24, 2)}
    torch.save({f"blocks.0.attn1.to_q.{name}.weight": value for name, value in factors.items()}, tmp_path / "a.pt")
    code, error = generated(lambda folder: None, "--lora", tmp_path / "a.pt")
    assert (code, "allow it (--allow-pickle)" in error) == (2, True)
    assert generated(lambda folder: None, "--lora", tmp_path / "a.pt", "--allow-pickle")[0] == 0
    (tmp_path / "clip.mp4").unlink()
    # so strong that its sums are infinite
    code, error = generated(lambda folder: None, "--lora", f"{tmp_path / 'a.pt'}:1e300", "--allow-pickle")
    assert (code, "or a LoRA is too strong" in error) == (2, True)


def test_text_that_was_no_numbers_is_not_kept(generated: Any, tmp_path: Path) -> None:
    generated(tensors(TEXT, nothing))
    kept = list((tmp_path / "cache").rglob("*.safetensors"))
    assert kept == []


def test_what_pickles_hold_beside_tensors_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for held, words in (
        ({"a": Path("b")}, "it holds pathlib.PosixPath beside tensors, which is not loaded"),
        ({1: torch.zeros(1)}, "holds no table of tensors by name"),
    ):
        torch.save(held, tmp_path / "model.pth")
        assert main(["inspect", str(tmp_path / "model.pth"), "--allow-pickle"]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "model.pth").write_bytes(b"junk" * 99)
    assert main(["inspect", str(tmp_path / "model.pth"), "--allow-pickle"]) == 2
    assert "it is damaged, or no pickle" in capsys.readouterr().err


CONVERSIONS: dict[str, tuple[Change, list[str], str]] = {
    "another shape": (tensors(DENOISER, lambda t: t[:-1].clone(), ROWS), [], "has the shape (23, 40), expected (24"),
    "int8": (tensors(CODEC, whole), [], "is of int8; quantised weights are not read"),
    "too large": (tensors(DENOISER, lambda t: t * 1e30), ["--dtype", "fp16"], "no finite numbers of float16"),
    "no codec": (lambda folder: shutil.rmtree(folder / "vae"), [], "no folder vae, which its model_index.json names"),
    "scheduler": (values("scheduler/scheduler_config.json", foo=1), [], "has unknown keys: foo"),
    "no class": (values("text_encoder/config.json", architectures=None), [], "does not say of which class it is"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_that_cannot_be_leaves_nothing(
    name: str, wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, arguments, words = CONVERSIONS[name]
    folder, target = shutil.copytree(wan, tmp_path / "model"), tmp_path / "new"
    change(folder)
    assert main(["convert", str(folder), str(target), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_an_interrupted_conversion_leaves_nothing(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_index", interrupt)
    assert main(["convert", str(wan), str(tmp_path / "new")]) == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(conversion.shutil, "copytree", full)
    capsys.readouterr()
    assert main(["convert", str(wan), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.endswith("/new: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_takes_no_place_that_is_taken(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lost").symlink_to("/nowhere/else")
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(wan), str(tmp_path / "lost")]) == 2
    assert "lost is there already: give a new place" in capsys.readouterr().err
    assert main(["convert", str(wan), str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "lost"]
