"""How much memory a computation takes, found out by running it on tensors that have sizes and no values.

Every operation is carried out on shapes alone (PyTorch's FakeTensorMode: tensors that say they are on the CPU and hold
nothing) while the bytes of all live storages are counted. So the count follows the code as it is: which tensors are
alive together, autocast's copies, views that share memory. Of what kernels take for themselves while they run, that of
convolutions on a CPU is counted. Attention is a fused kernel here, which never holds its scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Footprint:
    """Bytes that were alive at most while something ran, and that its result kept alive."""

    peak: int
    kept: int


@contextmanager
def without_values() -> Iterator[None]:
    """Tensors that are made in this block have no values, and no gradients."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        yield


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite numbers; without a temporary their size, and waiting for the device. Of tensors
    without values nothing is asked: True."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(tensor, FakeTensor) or not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def hollow(build: Callable[[], nn.Module], like: Mapping[str, Tensor]) -> nn.Module:
    """The module that `build` makes, with weights that have no values; to be called in `without_values`.

    like: weights by name, whose dtypes it gets.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("meta"):
        module = build().eval().requires_grad_(False)
    for name, old in module.state_dict(keep_vars=True).items():
        parent, _, leaf = name.rpartition(".")
        tensor = torch.empty(old.shape, dtype=like[name].dtype if name in like else old.dtype)
        value = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        setattr(module.get_submodule(parent), leaf, value)
    return module


def footprint(run: Callable[[], object], device_type: str = "cpu") -> Footprint:
    """Of `run` on such a device, to be called in `without_values`; what was there before it is not counted."""
    with _Count(device_type == "cpu") as count:
        result = run()
        kept = count.now
        del result
    return Footprint(count.peak, kept)


class _Count(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive."""

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._on_cpu = on_cpu
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._alive:
                continue
            if given is None:
                leaves = tree_leaves((args, kwargs))
                given = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
            if key not in given:  # else a view of what was there before
                self._add(key, storage)
        if self._on_cpu and func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + _scratch_bytes(out, *args))
        return out

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def _scratch_bytes(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> int:
    """What a convolution on a CPU takes beside its result. oneDNN's packs the weights in two steps. torch's own, which
    it takes for small inputs, writes out the patch that each place of a 3-D result is made of, and puts both sides
    in another order."""
    library: Any = torch._C
    # sizes, not values, say which kernel is taken
    if library._select_conv_backend(x, weight, bias, *rest) != library._ConvBackend.Slow3d:
        return 2 * weight.numel() * weight.element_size()
    patches = weight[0].numel() * len(out) * prod(out.shape[2:])
    return (patches + x.numel() + out.numel()) * x.element_size()
