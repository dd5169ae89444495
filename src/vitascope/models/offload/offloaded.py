"""A model whose weights come to its device when it is at work and go away after it; of its layers, group by group.

The model's own code is not touched: hooks before its modules see to it that weights are there. What it computes is the
same to the bit, except where layers are kept in fewer bits (`nn.storage`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitascope.core.errors import CapabilityError, InputError, choice
from vitascope.core.freed_memory import release_freed_memory
from vitascope.models.offload.stores import KeptStore, Store
from vitascope.models.offload.window import LayerWindow, buffer_bytes
from vitascope.nn.storage import STORAGES, Narrow, Storage, stored_bytes


@dataclass(frozen=True)
class Layers:
    """How many of a model's layers are on its device.

    resident: layers, from the first on, that stay there while the model is at work; None: all. The others come `group`
    at a time, the next ones while the present ones compute with `prefetch`. storage: what the others are kept as; in
    fewer bits they stay in the memory of the device and are widened one group at a time.
    Raises InputError for values that contradict each other.
    """

    resident: int | None = None
    group: int = 1
    prefetch: bool = True
    storage: Storage = "as_is"

    def __post_init__(self) -> None:
        choice("storage", self.storage, STORAGES)
        if self.group < 1 or (self.resident is not None and self.resident < 0):
            raise InputError(f"group must be at least 1 and resident at least 0, got {self.group}, {self.resident}")
        if self.storage != "as_is" and self.prefetch:
            raise InputError("layers kept in fewer bits are there already: give prefetch=False")


TRIM_BYTES = 16 << 20
"""Read after which what the C library holds of freed memory is given back: small weights leave holes between them."""
WHOLE = Layers()
IN_TURN = Layers(0, prefetch=False)
"""One at a time, when it is needed."""


@dataclass(frozen=True)
class WeightBytes:
    """What the weights of a model take: outside its layers, and each layer."""

    base: int
    layers: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Of the whole model."""
        return self.base + sum(self.layers)


class Offloaded:
    """The weights of `module`: on its `device` between `bring` and `away`, else in `store` alone.

    module: on the meta device, with the dtypes that it computes in. regions: its layers, in the order that it runs
    them; each must be a part of it. Raises CapabilityError for layers that were compiled.
    """

    def __init__(
        self,
        module: nn.Module,
        store: Store,
        device: torch.device | str,
        layers: Layers = WHOLE,
        regions: Sequence[nn.Module] = (),
    ) -> None:
        self.module, self.store, self.device, self.layers = module, store, torch.device(device), layers
        self.regions = list(regions)
        for region in self.regions:
            if getattr(region, "_compiled_call_impl", None) is not None:
                raise CapabilityError("layers that come and go cannot be compiled: leave one of the two away")
        self._weights = _Weights(module)
        self._base, self._layers = _divide(module, self.regions, self._weights.like)
        self._window: LayerWindow | None = None
        self._hooks: list[RemovableHandle] = []
        self._narrow: KeptStore | None = None
        self.present = False

    def bring(self) -> None:
        """Give the model its weights; does nothing where they are there. Raises CheckpointError for files that do not
        fit, and leaves the model without weights then."""
        if self.present:
            return
        self.present = True
        try:
            kept, groups = self._divided()
            freed = 0
            for name in kept:
                target = torch.empty(kept[name].shape, dtype=kept[name].dtype, device=self.device)
                self.store.read({name: target})
                self._weights.install(name, target)
                freed += target.nbytes
                if freed > TRIM_BYTES and self.device.type == "cpu":
                    release_freed_memory()
                    freed = 0
            if groups:
                self._open_window(groups)
        except BaseException:
            self.away()
            raise

    def away(self) -> None:
        """Take the weights away and give their memory back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        window, self._window = self._window, None
        if window is not None:
            window.close()
        self._narrow = None
        self._weights.clear()
        self.present = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            release_freed_memory()

    def change(self, layers: Layers) -> None:
        """Keep layers in another way from now on; weights that are there go away."""
        if layers != self.layers:
            self.away()
            self.layers = layers

    def weight_bytes(self) -> WeightBytes:
        """Of all weights in the dtypes that the model computes in."""
        return WeightBytes(_total(self._base), tuple(_total(layer) for layer in self._layers))

    def largest_bytes(self) -> int:
        """Of the largest weight."""
        return max(tensor.numel() * tensor.element_size() for tensor in self._weights.like.values())

    def transit_bytes(self) -> int:
        """What a weight on its way from the store takes at most beside the place that it goes to."""
        return self.store.transit_bytes(self._weights.like)

    def device_bytes(self, layers: Layers) -> int:
        """What the device holds of the weights while the model is at work with layers kept that way."""
        kept, groups = self._divided(layers)
        total = _total(kept)
        if groups:
            windows = 2 if layers.prefetch and len(groups) > 1 else 1
            total += windows * max(buffer_bytes(group) for group in groups)
            if windows > 1 and self.store.slow and self.device.type == "cpu":
                # what is read while layers compute
                total += self.store.transit_bytes([name for group in groups for name in group])
        if layers.storage != "as_is":
            looks = [(tuple(tensor.shape), tensor.dtype) for group in groups for tensor in group.values()]
            stored = {look: stored_bytes(*look, layers.storage) for look in set(looks)}
            total += sum(stored[look] for look in looks)
        return total

    def _divided(self, layers: Layers | None = None) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The weights that stay, and the groups that come and go."""
        layers = self.layers if layers is None else layers
        resident, kept = self._resident(layers), dict(self._base)
        for layer in self._layers[:resident]:
            kept |= layer
        groups: list[dict[str, Tensor]] = []
        for start in range(resident, len(self._layers), layers.group):
            group: dict[str, Tensor] = {}
            for layer in self._layers[start : start + layers.group]:
                group |= layer
            groups.append(group)
        return kept, groups

    def _open_window(self, groups: list[dict[str, Tensor]]) -> None:
        store, layers = self.store, self.layers
        if layers.storage != "as_is":
            like = {name: tensor for group in groups for name, tensor in group.items()}
            store = self._narrow = KeptStore.fill(self.store, like, layers.storage, device=self.device)
        window = self._window = LayerWindow(groups, store, self.device, self._weights.install, layers.prefetch)
        for place, region in enumerate(self.regions[self._resident(layers) :]):
            for module in region.modules():
                self._hooks.append(module.register_forward_pre_hook(_Needs(window, place // layers.group)))

    def _resident(self, layers: Layers) -> int:
        return len(self.regions) if layers.resident is None else min(layers.resident, len(self.regions))


class _Needs:
    """A hook before a module: the group that it is in must be there."""

    def __init__(self, window: LayerWindow, group: int) -> None:
        self._window, self._group = window, group

    def __call__(self, module: nn.Module, inputs: object) -> None:
        self._window.need(self._group)


class _Weights:
    """The weights of a module by name, given and taken away; without them it has tensors on the meta device."""

    def __init__(self, module: nn.Module) -> None:
        self.like: dict[str, Tensor] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            parent, _, leaf = name.rpartition(".")
            self.like[name] = torch.empty_like(tensor.detach(), device="meta")
            self._places[name] = (module.get_submodule(parent), leaf)

    def install(self, name: str, tensor: Tensor | None) -> None:
        """Give the module a weight; None takes it away."""
        module, leaf = self._places[name]
        value = self.like[name] if tensor is None else tensor
        if leaf in module._parameters:
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, leaf, value)

    def clear(self) -> None:
        """Take all weights away."""
        for name in self.like:
            self.install(name, None)


def offload(
    module: nn.Module, regions: Sequence[nn.Module], device: torch.device | str, layers: Layers = WHOLE
) -> Offloaded:
    """A model that has its weights, brought to `device` in the way of `layers`; `away` and `change` work from then on.

    Its weights are kept in the memory of the machine, pinned for a GPU. On a CPU nothing is saved but with layers in
    fewer bits: there, weights that come and go must be read from files (`FileStore`).
    """
    device = torch.device(device)
    own = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    pinned = device.type == "cuda"
    kept = {name: Narrow(tensor.cpu().pin_memory() if pinned else tensor) for name, tensor in own.items()}
    offloaded = Offloaded(module, KeptStore(kept), device, layers, regions)
    offloaded.away()
    offloaded.bring()
    return offloaded


def _divide(
    module: nn.Module, regions: Sequence[nn.Module], like: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The weights outside the regions, and of each region. Buffers, and parameters that a region has itself and not in
    a layer of it, are few and may be asked for before the region runs: they stay."""
    places = {id(part): name for name, part in module.named_modules()}
    parameters = {name for name, _ in module.named_parameters()}
    layers = []
    for region in regions:
        if id(region) not in places:
            raise InputError(f"{type(region).__name__} is not a part of {type(module).__name__}")
        prefix = places[id(region)] + "."
        inside = [name for name in like if name.startswith(prefix) and name in parameters]
        layers.append({name: like[name] for name in inside if "." in name.removeprefix(prefix)})
    moving = {name for layer in layers for name in layer}
    return {name: tensor for name, tensor in like.items() if name not in moving}, layers


def _total(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
