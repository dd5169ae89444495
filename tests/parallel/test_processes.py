"""Three processes against one: exchanges, shared tokens, and layers that work on strips of frames.

Three, because with two the one before is the one after. Every case runs in the same three processes, and gives the
relative error of what each of them found.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, InputError, ShapeError
from vitascope.models.codecs.wan.model import Double, FrameAttention
from vitascope.nn.causal_conv import CausalConv3d, TailCache
from vitascope.nn.edge_conv import EdgeConv3d, FrameGroupNorm
from vitascope.ops.attention import attend
from vitascope.parallel.launch import joined
from vitascope.parallel.ranks import Ranks
from vitascope.parallel.strips import Reach, Strips, Told, read_of_frames, shared_frames, total_of_frames
from vitascope.parallel.tokens import SHARINGS, Share, attend_jointly

COUNT = 3
TOLERANCE = 1e-5
"""Relative; the same fp32 sums in another order."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def differ(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).norm() / b.norm()) if b.numel() else 0.0


def exchanges(ranks: Ranks) -> float:
    """Every exchange of a few numbers, against what comes out by hand; counts the wrong ones."""
    me, sizes = ranks.rank, [3, 0, 1]
    whole, wrong = torch.arange(8.0).view(2, 4), 0
    wrong += not torch.equal(ranks.gather(ranks.take(whole, sizes, 1), sizes, 1), whole)
    wrong += not torch.equal(ranks.sum(torch.tensor([me + 1.0, 10.0])), torch.tensor([6.0, 30.0]))
    # process i sends j + 1 times the number 10 i + j to process j
    sent = torch.tensor([10.0 * me + j for j in range(3) for _ in range(j + 1)])
    got = ranks.swap(sent, [1, 2, 3], [me + 1] * 3)
    wrong += got.tolist() != [10.0 * i + me for i in range(3) for _ in range(me + 1)]
    before = (me - 1) % 3
    wrong += ranks.pass_on(torch.full((me + 1,), float(me)), (before + 1,))().tolist() != [before] * (before + 1)
    rows = torch.arange(3.0) + 10 * me
    above, below = ranks.edges(rows.view(1, 3), 1, 2)
    wrong += (None if above is None else above.tolist()) != ([[10 * me - 9, 10 * me - 8]] if me else None)
    wrong += (None if below is None else below.tolist()) != ([[10 * me + 10, 10 * me + 11]] if me < 2 else None)
    wrong += ranks.from_first(lambda: {"made by": me}) != {"made by": 0}
    return float(wrong)


def errors_of_the_first(ranks: Ranks) -> float:
    """What the first process raises on purpose, all raise; and they go on together."""

    def refuse() -> None:
        raise InputError("too long a prompt")

    try:
        ranks.from_first(refuse)
    except InputError as error:
        return float(str(error) != "too long a prompt")
    return 1.0


def some_of_all(ranks: Ranks) -> float:
    """The first and the last as a group of their own: who is before and after is meant within it."""
    group = dist.new_group([0, 2])
    if ranks.rank == 1:
        return 0.0
    assert isinstance(group, dist.ProcessGroup)
    two = Ranks(ranks.rank // 2, 2, ranks.device, group)
    other, wrong = 1 - two.rank, 0
    wrong += two.sum(torch.tensor([two.rank + 1.0])).item() != 3.0
    wrong += two.pass_on(torch.tensor([float(two.rank)]), (1,))().item() != other
    wrong += two.from_first(lambda: two.rank) != 0
    edge = two.edges(torch.tensor([float(two.rank)]), 0, 1)[other]
    wrong += edge is None or edge.item() != other
    return float(wrong)


def gradients(ranks: Ranks) -> float:
    """Refused, not lost."""
    x, refused = torch.ones(3, 3, requires_grad=True), 0
    for act in (
        lambda: ranks.sum(x),
        lambda: ranks.gather(x, [3, 3, 3], 0),
        lambda: ranks.swap(x, [1, 1, 1], [1, 1, 1]),
        lambda: ranks.pass_on(x, (3, 3)),
        lambda: ranks.edges(x, 0, 1),
    ):
        try:
            act()
        except CapabilityError as error:
            refused += "torch.no_grad()" in str(error)
    with torch.no_grad():
        refused += torch.equal(ranks.sum(x), 3 * torch.ones(3, 3))
    return float(refused != 6)


def tokens(kind: str, length: int, heads: tuple[int, int], mask: str = "") -> Callable[[Ranks], float]:
    """Attention of a sequence to itself; a mask is of pairs of tokens, of keys, or one for every head."""

    def case(ranks: Ranks) -> float:
        share = SHARINGS[kind](ranks).of(length)
        q, k, v = (draw(2, length, num, 4, seed=num + i) for i, num in enumerate((heads[0], heads[1], heads[1])))
        seen = None
        if mask:
            shape = {"pairs": (length, length), "keys": (2, 1, 1, length), "heads": (2, heads[0], length, length)}[mask]
            seen = torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.5
            seen[..., length - 1] = True
        found = share.attend(share.split(q), share.split(k), share.split(v), seen)
        return differ(share.join(found), attend(q, k, v, seen))

    return case


def joint(kind: str, length: int, num_words: int, num_queries: int) -> Callable[[Ranks], float]:
    """Shared video and words that all have; the words' answer must be the same to the bit everywhere."""

    def case(ranks: Ranks) -> float:
        share = SHARINGS[kind](ranks).of(length)
        video = (draw(2, length, 6, 4), draw(2, length, 6, 4, seed=1), draw(2, length, 6, 4, seed=2))
        words = (draw(2, num_queries, 6, 4, seed=3), draw(2, num_words, 6, 4, seed=4), draw(2, num_words, 6, 4, seed=5))
        seen = torch.arange(num_words) < torch.tensor([[num_words], [1]])
        own = (share.split(video[0]), share.split(video[1]), share.split(video[2]))
        found, told = share.attend_joint(own, words, seen)
        expected = attend_jointly(video, words, seen)
        of_all = ranks.gather(told.flatten().unsqueeze(0), [1] * ranks.size, 0)
        assert all(torch.equal(other, of_all[0]) for other in of_all)
        return max(differ(share.join(found), expected[0]), differ(told, expected[1]))

    return case


def belongs_to_all(ranks: Ranks) -> float:
    """An axis of one is not split, tables are split along their first axis, and any axis can be joined."""
    share: Share = SHARINGS["ring"](ranks).of(7)
    one, table = draw(2, 1, 5), (draw(7, 4), draw(7, 4, seed=1))
    wrong = not torch.equal(share.split(one), one)
    parts = share.split_table(table)
    wrong += not all(torch.equal(share.join(part, 0), whole) for part, whole in zip(parts, table, strict=True))
    wrong += [3, 2, 2][ranks.rank] != len(parts[0])
    return float(wrong)


def refusals(ranks: Ranks) -> float:
    wrong = 3
    for act, message in (
        (lambda: SHARINGS["ring"](ranks).of(2), "2 tokens cannot be shared by 3 processes; use at most 2"),
        (
            lambda: SHARINGS["ulysses"](ranks).check_heads(8, 4),
            "4 heads cannot be exchanged between 3 processes; valid",
        ),
        (lambda: SHARINGS["ulysses"](ranks).check_heads(12, 2), "valid numbers of processes: 1, 2; ring takes any"),
    ):
        try:
            act()
        except ShapeError as error:
            wrong -= message in str(error)
    SHARINGS["ring"](ranks).check_heads(1, 1)
    SHARINGS["ulysses"](ranks).check_heads(6, 3)
    return float(wrong)


def filled(layer: nn.Module) -> nn.Module:
    make = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=make)
    return layer.eval().requires_grad_(False)


STRIPPED: dict[str, tuple[Callable[[], nn.Module], Reach | Told]] = {
    "zero-padded convolution": (lambda: CausalConv3d(4, 6), Reach(1)),
    "wide convolution": (lambda: CausalConv3d(4, 6, (2, 5, 3)), Reach(2)),
    "edge-padded convolution": (lambda: EdgeConv3d(4, 6), Reach(1)),
    "doubling": (lambda: Double(4, time=True), Reach(1, 2)),
    "attention in frames": (lambda: FrameAttention(4), Told("read", read_of_frames)),
    "group norm of frames": (lambda: FrameGroupNorm(2, 4), Told("total", total_of_frames)),
}


def strip(name: str, rows: int) -> Callable[[Ranks], float]:
    def case(ranks: Ranks) -> float:
        make, way = STRIPPED[name]
        layer, x = filled(make()), draw(2, 3, rows, 5, 4)
        expected = layer(x)
        strips = Strips.of(rows, ranks)
        with shared_frames([(layer, way)], strips):
            out = layer(ranks.take(x, strips.sizes, 2))
        assert torch.equal(layer(x), expected), "the layer is not as it was"
        return differ(ranks.gather(out, [size * (expected.shape[2] // rows) for size in strips.sizes], 2), expected)

    return case


def strip_chunks(ranks: Ranks) -> float:
    """A stream of two chunks on strips, through the cache of the layer."""
    layer, x, cache = filled(CausalConv3d(4, 6)), draw(1, 5, 4, 3, 4), TailCache()
    strips = Strips.of(4, ranks)
    own = ranks.take(x, strips.sizes, 2)
    with shared_frames([(layer, Reach(1))], strips):
        out = torch.cat([layer(own[:, :2], cache), layer(own[:, 2:], cache)], 1)
    return differ(ranks.gather(out, strips.sizes, 2), layer(x))


def thin_strips(ranks: Ranks) -> float:
    layer, strips = CausalConv3d(4, 6, (1, 5, 5)), Strips.of(5, ranks)
    try:
        with shared_frames([(layer, Reach(2))], strips):
            layer(draw(1, 1, strips.sizes[ranks.rank], 5, 4))
    except ShapeError as error:
        return float(
            "strips of 1 rows are too thin: a layer reads 2" not in str(error) or len(layer._forward_hooks) > 0
        )
    return 1.0


CASES: dict[str, Callable[[Ranks], float]] = {
    "exchanges": exchanges,
    "errors of the first": errors_of_the_first,
    "some of all": some_of_all,
    "gradients": gradients,
    "ulysses": tokens("ulysses", 9, (6, 6)),
    "ulysses, uneven": tokens("ulysses", 10, (6, 6)),
    "ulysses, shared keys, a token each": tokens("ulysses", 3, (6, 3)),
    "ulysses, pairs masked": tokens("ulysses", 8, (3, 3), "pairs"),
    "ulysses, heads masked": tokens("ulysses", 8, (6, 6), "heads"),
    "ring": tokens("ring", 9, (6, 6)),
    "ring, uneven": tokens("ring", 11, (5, 5)),
    "ring, shared keys, a token each": tokens("ring", 3, (4, 1)),
    "ring, pairs masked": tokens("ring", 8, (2, 2), "pairs"),
    "ring, keys masked": tokens("ring", 8, (2, 2), "keys"),
    "ring, heads masked": tokens("ring", 8, (4, 2), "heads"),
    "ulysses, joint": joint("ulysses", 10, 5, 5),
    "ulysses, joint, silent words": joint("ulysses", 7, 5, 0),
    "ring, joint": joint("ring", 10, 5, 5),
    "ring, joint, fewer words than processes": joint("ring", 10, 2, 2),
    "ring, joint, silent words": joint("ring", 7, 5, 0),
    "belongs to all": belongs_to_all,
    "refusals": refusals,
    **{f"strips, {name}, {rows} rows": strip(name, rows) for name in STRIPPED for rows in (6, 8)},
    "strips, chunks": strip_chunks,
    "strips, thin": thin_strips,
}


def work(result: Path) -> None:
    with joined(os.environ, "cpu", patience_s=240.0) as ranks:
        found = {name: case(ranks) for name, case in CASES.items()}
    result.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(in_processes: Callable[..., list[Any]]) -> list[dict[str, float]]:
    return in_processes(__file__, COUNT)


@pytest.mark.parametrize("name", CASES)
def test_every_process_has_what_one_alone_has(name: str, found: list[dict[str, float]]) -> None:
    assert all(result[name] < TOLERANCE for result in found), [result[name] for result in found]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
