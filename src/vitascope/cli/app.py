"""The command `vitascope`: finds the verb, imports that verb alone, and turns whatever goes wrong into one line.

Exit codes: 0 done, 1 a fault of ours (VITASCOPE_TRACEBACK=1 shows where), 2 what was asked for cannot be done (also
full disks and lack of memory), 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Annotated, NoReturn

import typer

import vitascope
from vitascope.core.errors import VitascopeError, is_out_of_memory

DONE, FAULT, REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

VERBS: dict[str, str] = {
    "generate": "Make video with sound from a sentence, pictures, sound or video.",
    "rerun": "Make a clip again from the recipe inside its file.",
    "train": "Run a training recipe: a codec or the denoiser.",
    "evaluate": "Measure a model on held-out prompts and seeds.",
    "world": "Render captioned sample clips of the procedural theatre, with sound and ground truth.",
    "inspect": "Tell what a model is: family, layout, parts, sizes.",
    "convert": "Write a public model in the layout of diffusers or of its authors.",
    "presets": "Print parameter and operation counts of the denoiser presets.",
}
"""Verb and help line. Verb `x` is the function `x` of the module `vitascope.cli.x`, imported only when it is named."""


class _TerminatedError(BaseException):
    """SIGTERM came: unwind, so that no partial file is left."""


def run() -> NoReturn:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Nothing but SystemExit of the verb itself escapes."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    verb = _verb(arguments)
    name = f"vitascope {verb}" if verb else "vitascope"
    try:
        code = build_app(arguments)(args=arguments, prog_name="vitascope", standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else DONE
    except (KeyboardInterrupt, typer.Abort):
        return _say(name, "interrupted", INTERRUPTED)
    except _TerminatedError:
        return _say(name, "terminated", TERMINATED)
    except typer.TyperException as error:
        return _usage(name, error)
    except VitascopeError as error:
        return _say(name, str(error), REFUSED)
    except MemoryError:
        return _say(name, "not enough memory; ask for a smaller size, fewer frames or a smaller batch", REFUSED)
    except BrokenPipeError:
        # Whoever read our output has left (`| head`): stop quietly; the interpreter must not flush into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(name, f"{where}{error.strerror or error}", REFUSED)
    except Exception as error:
        if is_out_of_memory(error):
            return _say(name, "not enough memory; ask for a smaller size, fewer frames or a smaller batch", REFUSED)
        if os.environ.get("VITASCOPE_TRACEBACK"):
            traceback.print_exc()
        hint = "this is a fault of vitascope; VITASCOPE_TRACEBACK=1 shows where"
        return _say(name, f"{type(error).__name__}: {error} ({hint})", FAULT)


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """The application for these arguments: the named verb with its options, the others by name and help line only."""
    app = typer.Typer(
        name="vitascope",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=vitascope.__doc__)(_root)
    chosen = _verb(arguments)
    for verb, help_line in VERBS.items():
        function = getattr(importlib.import_module(f"vitascope.cli.{verb}"), verb) if verb == chosen else _not_loaded
        app.command(verb, help=None if verb == chosen else help_line)(function)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vitascope {vitascope.__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options that stand before the verb."""


def _not_loaded() -> None:
    """Stands for the verbs that were not named, so that `vitascope --help` imports none of them."""


def _verb(arguments: Sequence[str]) -> str | None:
    """The first argument that is not an option, if it is a verb. (No option of the root takes a value.)"""
    word = next((argument for argument in arguments if not argument.startswith("-")), None)
    return word if word in VERBS else None


def _usage(name: str, error: typer.TyperException) -> int:
    """A wrong flag or value, as one line."""
    return _say(name, f"{error.format_message().rstrip('.')} (see {name} --help)", REFUSED)


def _say(name: str, message: str, code: int) -> int:
    """One line on stderr, whatever the message holds."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{name}: {' '.join(message.split())}\n")
        sys.stderr.flush()
    return code


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Let SIGTERM unwind the stack like Ctrl-C does."""
    raise _TerminatedError
