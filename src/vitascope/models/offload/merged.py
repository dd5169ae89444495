"""LoRAs under a limit of memory: merged into each weight when it is read.

What they make of a weight is what `LoraStack` makes of it, to the bit; nothing but their factors stands in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from vitascope.core.errors import CapabilityError
from vitascope.models.lora import Scaled, merge_into
from vitascope.models.offload.stores import KeptStore, Store

MERGING_COPIES = 3
"""In fp32, of a weight that is merged into: the sum, a product of factors, and that times its scale."""


class MergedStore:
    """A store whose weights come with `updates` (by our names) merged into them, in the dtype they are read in.

    sizes: numbers in each of these weights.
    """

    def __init__(self, inner: Store, updates: Mapping[str, Sequence[Scaled]], sizes: Mapping[str, int]) -> None:
        self.inner, self._updates, self._sizes = inner, dict(updates), dict(sizes)

    @property
    def slow(self) -> bool:
        """As the store inside."""
        return self.inner.slow

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Raises what the store inside raises."""
        self.inner.read(into)
        for name, tensor in into.items():
            if name in self._updates:
                merge_into(tensor, self._updates[name])

    def transit_bytes(self, names: Iterable[str]) -> int:
        """Of reading, or of merging, which comes after it."""
        names = list(names)
        changed = [4 * MERGING_COPIES * self._sizes[name] for name in names if name in self._updates]
        return max(self.inner.transit_bytes(names), *changed, 0)


def with_updates(store: Store, model: nn.Module, updates: Mapping[str, Sequence[Scaled]]) -> Store:
    """The store of a model's weights with LoRAs (`models.lora.updates_of`) merged into them: where they are kept in
    memory at once, else whenever they are read. Raises CapabilityError for weights that are no floating point."""
    like = model.state_dict()
    for name in updates:
        if not like[name].is_floating_point():
            raise CapabilityError(f"a LoRA cannot be added to {name}: its weights are quantised")
    if isinstance(store, KeptStore):
        for name, parts in updates.items():
            merge_into(store.kept(name), parts)
        return store
    return MergedStore(store, updates, {name: like[name].numel() for name in updates})
