"""Models as the command line names them: loaded whole, within a limit of memory, or shared between processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitascope.cli.reporting import say
from vitascope.core.errors import CapabilityError, InputError

if TYPE_CHECKING:
    from vitascope.tasks.load import Beside
    from vitascope.tasks.pipeline import Pipeline


@dataclass(frozen=True)
class ModelChoice:
    """What the command line says of the model; see `vitascope generate --help`."""

    model: str
    device: str
    precision: str
    beside: Beside
    loras: tuple[str, ...] = ()
    memory: str = ""
    lossy: bool = False
    parallel: str = ""

    def check(self) -> None:
        """Raise InputError (CapabilityError) for what can be told before the model is read."""
        from vitascope.core.memory import parse_bytes
        from vitascope.tasks.lora import parse_lora

        for text in self.loras:
            parse_lora(text)
        if self.memory:
            parse_bytes(self.memory)
        elif self.lossy:
            raise InputError("--lossy goes with --memory")
        for name, value in (("--memory", self.memory), ("--lora", self.loras)):
            if self.parallel and value:
                raise CapabilityError(f"{name} is for one process: leave out --parallel")


@dataclass(frozen=True)
class Opened:
    """A pipeline, and whether this process is the one that writes and speaks."""

    pipeline: Pipeline
    speaks: bool = True


@contextmanager
def open_model(choice: ModelChoice) -> Iterator[Opened]:
    """The model that was chosen, for as long as the block lasts. Raises what loading raises."""
    from vitascope.core.freed_memory import return_freed_memory
    from vitascope.core.memory import parse_bytes
    from vitascope.models.text.cache import user_cache_folder
    from vitascope.tasks.fitting import MemoryLimit
    from vitascope.tasks.load import load_pipeline
    from vitascope.tasks.lora import apply_loras

    cache, limit = user_cache_folder(os.environ), None
    if choice.memory:
        return_freed_memory()
        limit = MemoryLimit(parse_bytes(choice.memory), choice.lossy, lambda plan: say("\n".join(plan.lines())))
    with ExitStack() as stack:
        if choice.parallel:
            from vitascope.parallel.launch import joined
            from vitascope.tasks.parallel import load_parallel

            ranks = stack.enter_context(joined(os.environ, choice.device))
            shared = load_parallel(
                choice.model, choice.parallel, ranks, choice.precision, choice.beside, text_cache=cache
            )
            yield Opened(shared, ranks.is_first)
            return
        pipeline = load_pipeline(
            choice.model, choice.device, choice.precision, choice.beside, text_cache=cache, memory=limit
        )
        if pipeline.memory is not None:
            stack.callback(pipeline.memory.release)
        pickles = choice.beside.allow_pickle
        yield Opened(apply_loras(pipeline, choice.loras, note=lambda text: say(f"note: {text}"), allow_pickle=pickles))
