"""What the shapes of a checkpoint say of the model they are of, where no configuration lies beside it."""

from __future__ import annotations

from vitascope.core.errors import CheckpointError
from vitascope.weights.sources import TensorSource


class Shapes:
    """The shapes of a source by name."""

    def __init__(self, source: TensorSource) -> None:
        self._source, self._names = source, frozenset(source.names())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises CheckpointError where it is not there."""
        if name not in self._names:
            raise CheckpointError(f"the tensors of {self._source.label} do not fit: {name} is missing")
        return self._source.info(name).shape

    def axis(self, name: str, axis: int) -> int:
        """The size of one axis of a tensor. Raises CheckpointError where it is not there."""
        shape = self[name]
        if not -len(shape) <= axis < len(shape):
            raise CheckpointError(f"{self._source.label}: {name} has the shape {shape}, {axis + 1} axes were expected")
        return shape[axis]

    def first(self, prefix: str) -> str:
        """The first name that begins so, in the order of the alphabet, or an empty text."""
        return min((name for name in self._names if name.startswith(prefix)), default="")

    def count(self, prefix: str) -> int:
        """How many layers are listed under `prefix` as 0, 1, ...: one more than the highest number."""
        places = (name.removeprefix(prefix + ".") for name in self._names if name.startswith(prefix + "."))
        numbers = [place.partition(".")[0] for place in places]
        return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
