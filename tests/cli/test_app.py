"""Exit codes, one-line errors, and verbs imported only when named."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import typer

import vitascope
from vitascope.cli.app import VERBS, build_app, main
from vitascope.core.errors import CapabilityError, CheckpointError, MediaError, PromptError


@pytest.fixture
def add_verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Registers a function as the verb `probe`."""

    def add(function: Callable[..., None]) -> None:
        module = ModuleType("vitascope.cli.probe")
        module.__dict__["probe"] = function
        monkeypatch.setitem(sys.modules, "vitascope.cli.probe", module)
        monkeypatch.setitem(VERBS, "probe", "A verb of the tests.")

    return add


def raising(error: BaseException) -> Callable[..., None]:
    def probe() -> None:
        raise error

    return probe


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PromptError("the prompt is empty"), 2, "vitascope probe: the prompt is empty\n"),
        (CapabilityError("no\nsecond line"), 2, "vitascope probe: no second line\n"),
        (MediaError("a.png does not exist"), 2, "vitascope probe: a.png does not exist\n"),
        (CheckpointError("b.safetensors is damaged"), 2, "vitascope probe: b.safetensors is damaged\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "vitascope probe: No space left on device\n"),
        (OSError(errno.EACCES, "Permission denied", "x.json"), 2, "vitascope probe: x.json: Permission denied\n"),
        (KeyboardInterrupt(), 130, "vitascope probe: interrupted\n"),
        (typer.Exit(7), 7, ""),
    ],
)
def test_errors_become_one_line_and_a_code(
    add_verb: Callable[[Callable[..., None]], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    add_verb(raising(error))
    assert main(["probe"]) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate"), RuntimeError("DefaultCPUAllocator: can't")],
)
def test_lack_of_memory_says_what_to_do(
    add_verb: Callable[[Callable[..., None]], None], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    add_verb(raising(error))
    assert main(["probe"]) == 2
    assert capsys.readouterr().err.startswith("vitascope probe: not enough memory; ask for a smaller")


def test_a_fault_of_ours_is_one_line_and_shows_its_trace_on_request(
    add_verb: Callable[[Callable[..., None]], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_verb(raising(ZeroDivisionError("by zero")))
    assert main(["probe"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vitascope probe: ZeroDivisionError: by zero")
    assert error.count("\n") == 1
    monkeypatch.setenv("VITASCOPE_TRACEBACK", "1")
    main(["probe"])
    assert "Traceback" in capsys.readouterr().err


def test_wrong_usage_is_one_line_that_names_the_help(
    add_verb: Callable[[Callable[..., None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def probe(count: int, fast: bool = False) -> None:
        typer.echo(f"{count} {fast}")

    add_verb(probe)
    assert main(["probe", "3", "--fast"]) == 0
    assert capsys.readouterr() == ("3 True\n", "")
    for arguments, words in {
        ("probe", "three"): "'count'",
        ("probe",): "Missing argument",
        ("probe", "3", "--slow"): "--slow",
        ("--slow",): "--slow",
        ("prob",): "'prob'",
    }.items():
        assert main(list(arguments)) == 2
        output, error = capsys.readouterr()
        assert output == ""
        assert words in error
        assert "--help)" in error
        assert error.count("\n") == 1


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vitascope {vitascope.__version__}\n"
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_its_module_and_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {command.name for command in build_app([verb]).registered_commands}
    assert names == set(VERBS)
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"vitascope {verb}" in shown
    assert "not named" not in shown


def test_help_and_version_import_neither_torch_nor_verbs() -> None:
    script = """
        import sys
        from vitascope.cli.app import main
        assert main(["--help"]) == 0 and main(["--version"]) == 0 and main(["nonsense"]) == 2
        heavy = {"torch", "numpy", "av", "PIL", "vitascope.cli.world"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_partial_file(tmp_path: Path, number: int, code: int) -> None:
    script = f"""
        import pathlib, signal, sys, time, types
        from vitascope.cli import app
        from vitascope.media.files import atomic_file

        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

        def probe():
            with atomic_file(pathlib.Path({str(tmp_path / "clip.mp4")!r})) as file:
                file.write(b"half")
                print("writing", flush=True)
                time.sleep(60)

        module = types.ModuleType("vitascope.cli.probe")
        module.probe = probe
        sys.modules["vitascope.cli.probe"] = module
        app.VERBS["probe"] = ""
        sys.argv = ["vitascope", "probe"]
        app.run()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=30) == code
        assert process.stderr.read().count("\n") == 1
    assert list(tmp_path.iterdir()) == []
