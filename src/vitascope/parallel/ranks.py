"""The processes that work on one clip, and what they exchange.

Every method is called by all processes of the group, in the same order. Sizes that processes need not agree on (shares
of a length that does not divide) are known to all of them beforehand, so nothing is padded but a gathering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vitascope.core.errors import CapabilityError, ShapeError, VitascopeError

T = TypeVar("T")


def even_sizes(total: int, num: int) -> list[int]:
    """`total` things in `num` shares as even as can be: the first ones have one more where it does not divide."""
    return [total // num + (index < total % num) for index in range(num)]


def share_sizes(total: int, num: int, what: str) -> list[int]:
    """`even_sizes` for `num` processes. Raises ShapeError, naming `what`, where one of them would have none."""
    if total < num:
        raise ShapeError(f"{total} {what} cannot be shared by {num} processes; use at most {total}")
    return even_sizes(total, num)


@dataclass(frozen=True)
class Ranks:
    """`size` processes of which this is number `rank`, working on `device`.

    group: of torch.distributed; None is the group of all processes.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def own(self, sizes: Sequence[int]) -> slice:
        """This process's share of an axis that is shared in these sizes."""
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def take(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """This process's share of `x` along `dim`, a view."""
        own = self.own(sizes)
        return x.narrow(dim, own.start, own.stop - own.start)

    def gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The shares of all processes one after the other along `dim`."""
        _check_no_gradients(x)
        first = x.movedim(dim, 0)
        padded = F.pad(first, (0, 0) * (x.ndim - 1) + (0, max(sizes) - len(first))).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, the same to the bit on each; `x` itself may become it."""
        _check_no_gradients(x)
        total = x.contiguous()
        dist.all_reduce(total, group=self.group)
        return total

    def swap(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """All to all: the first `send[0]` entries of axis 0 go to process 0, and so on; what comes from process 0
        stands first, `receive[0]` entries of it."""
        _check_no_gradients(x)
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self.group)
        return out

    def pass_on(self, x: Tensor, shape: Sequence[int]) -> Callable[[], Tensor]:
        """Send `x` to the next process and receive a tensor of this shape from the one before.

        What is returned gives it when called; other work can be done until then.
        """
        _check_no_gradients(x)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        received = x.new_empty(shape)
        wait = self._exchange([(x.contiguous(), after)], [(received, before)])

        def result() -> Tensor:
            wait()
            return received

        return result

    def edges(self, x: Tensor, dim: int, num: int) -> tuple[Tensor | None, Tensor | None]:
        """The last `num` entries along `dim` of the process before this one and the first of the one after it; None at
        the two ends of the row of processes."""
        _check_no_gradients(x)
        found: list[Tensor | None] = [None, None]
        send: list[tuple[Tensor, int]] = []
        receive: list[tuple[Tensor, int]] = []
        for side, peer, start in ((0, self.rank - 1, 0), (1, self.rank + 1, x.shape[dim] - num)):
            if 0 <= peer < self.size:
                edge = x.narrow(dim, start, num).contiguous()
                found[side] = other = torch.empty_like(edge)
                send.append((edge, peer))
                receive.append((other, peer))
        if x.numel():
            self._exchange(send, receive)()
        return found[0], found[1]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first process, which alone calls it; an error that it raises on purpose, on all."""
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except VitascopeError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        made, error = outcome
        if error is not None:
            raise error
        return made

    def _exchange(self, send: list[tuple[Tensor, int]], receive: list[tuple[Tensor, int]]) -> Callable[[], None]:
        """Begin to send and receive; what is returned waits for the end and keeps the tensors alive until then."""
        parts = [dist.P2POp(dist.isend, x, group=self.group, group_peer=peer) for x, peer in send]
        parts += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer) for x, peer in receive]
        works = dist.batch_isend_irecv(parts) if parts else []

        def wait() -> None:
            for work in works:
                work.wait()
            parts.clear()

        return wait


def _check_no_gradients(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise CapabilityError("gradients do not pass between processes that share a clip: run under torch.no_grad()")
