"""Updates of their layers as updates of ours, through every rule of a key table."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitascope.core.errors import CheckpointError
from vitascope.weights.keys import Drop, Flatten, Fuse, KeyTable, Rename, Split, Squeeze, Swap, convert
from vitascope.weights.lora import Difference, Lora, LowRank, Target, Update
from vitascope.weights.lora_fit import Layout, Part, fit

TABLE: KeyTable = (
    Rename("a.weight", "ours.a.weight"),
    Fuse(("b_{n}.q.weight", "b_{n}.k.weight", "b_{n}.v.weight"), "ours.{n}.qkv.weight"),
    Fuse(("wide.weight", "slim.weight"), "both.weight", (3, 1)),
    Split("mix.weight", ("left.weight", "right.weight"), (1, 2)),
    Swap("final.weight", "head.weight"),
    Swap("final.bias", "head.bias"),
    Flatten("patch.weight", "embed.weight", (2, 1, 3)),
    Squeeze("point.weight", "thin.weight", -2),
    Squeeze("table", "rows", 1),
    Drop("unused.{anything}"),
)
OURS = {
    "ours.a.weight": (4, 6), "ours.0.qkv.weight": (12, 6), "ours.1.qkv.weight": (12, 5), "both.weight": (8, 3),
    "left.weight": (2, 7), "right.weight": (4, 7), "head.weight": (6, 4), "head.bias": (6,), "embed.weight": (5, 6),
    "thin.weight": (3, 4), "rows": (6, 2),
}  # fmt: skip
LAYOUT = Layout(TABLE, {name: torch.Size(shape) for name, shape in OURS.items()})
CPU = torch.device("cpu")


def total(parts: list[Part]) -> dict[str, Tensor]:
    """What parts add to each of our tensors."""
    sums = {name: torch.zeros(shape) for name, shape in OURS.items()}
    for part in parts:
        sums[part.name][part.rows] += part.update.delta(CPU)
    return sums


def update_of(name: str, rank: int, whole: bool) -> Difference | LowRank:
    shape = LAYOUT.shapes[name]
    draw = torch.Generator().manual_seed(rank)
    if whole or len(shape) < 2 or name == "table":
        return Difference(torch.randn(shape, generator=draw))
    return LowRank(
        torch.randn(rank, *shape[1:], generator=draw), torch.randn(shape[0], rank, generator=draw), 0.5 * rank
    )


@given(st.lists(st.sampled_from(sorted(LAYOUT.shapes)), min_size=1, unique=True), st.integers(1, 4), st.booleans())
def test_an_update_read_is_the_update_of_what_is_read(names: list[str], rank: int, whole: bool) -> None:
    """The whole update through the key table, as a checkpoint is read, is the sum of its parts."""
    updates = {name: update_of(name, rank, whole) for name in names}
    theirs = {name: torch.zeros(shape) for name, shape in LAYOUT.shapes.items()}
    theirs |= {name: update.delta(CPU) for name, update in updates.items()}
    targets: dict[Target, Update] = {}
    for name, update in updates.items():
        leaf = "bias" if name.endswith(".bias") else "weight"
        targets[Target(name.removesuffix(f".{leaf}"), leaf)] = update
    found = total(fit(Lora("x", targets), {"only": LAYOUT}, "the model"))
    for name, expected in convert(TABLE, theirs).items():
        torch.testing.assert_close(found[name], expected)


def test_only_the_rows_of_a_layer_are_touched() -> None:
    (key,) = LAYOUT.carry("b_1.k.weight", update_of("b_1.k.weight", 2, False))
    assert (key.name, key.rows) == ("ours.1.qkv.weight", slice(4, 8))
    assert isinstance(key.update, LowRank)
    assert key.update.up.shape == (4, 2)
    left, right = LAYOUT.carry("mix.weight", update_of("mix.weight", 3, False))
    assert [left.name, right.name] == ["left.weight", "right.weight"]
    assert [part.rows for part in (left, right)] == [slice(0, 2), slice(0, 4)]


def interleaved() -> Rename:
    """A rule that a table may have one day: even rows first."""

    class Interleave(Rename):
        def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
            return [torch.cat([tensor[::2], tensor[1::2]]) for tensor in tensors]

        def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
            return [torch.stack(tensor.chunk(2), 1).flatten(0, 1) for tensor in tensors]

    return Interleave("a.weight", "b.weight")


def test_rows_in_any_order_are_followed() -> None:
    rule = interleaved()
    layout = Layout((rule,), {"b.weight": torch.Size((6, 3))})
    update = LowRank(torch.randn(2, 3), torch.randn(6, 2), 1.0)
    (part,) = layout.carry("a.weight", update)
    torch.testing.assert_close(part.update.delta(CPU), rule.read([update.delta(CPU)])[0])
    assert part.rows == slice(0, 6)


def test_rows_apart_from_each_other_are_numbered() -> None:
    class Woven(Fuse):
        def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
            return [torch.stack(list(tensors), 1).flatten(0, 1)]

        def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensors[0][::2], tensors[0][1::2]]

    layout = Layout((Woven(("a.weight", "b.weight"), "c.weight"),), {"c.weight": torch.Size((6, 3))})
    (part,) = layout.carry("b.weight", Difference(torch.randn(3, 3)))
    assert isinstance(part.rows, Tensor)
    assert part.rows.tolist() == [1, 3, 5]


def place(name: str, flat: bool = True) -> list[str]:
    return LAYOUT.find(Target(name, flat=flat))


def test_underscores_are_resolved_by_the_names_that_there_are() -> None:
    assert place("b_1_q") == ["b_1.q.weight"]
    assert place("b_1.q") == ["b_1.q.weight"]  # some writers leave dots
    assert place("table") == ["table"]
    assert place("b_1_q", flat=False) == []
    assert LAYOUT.find(Target("final", "bias", flat=True)) == ["final.bias"]
    assert place("b_7_q") == []
    table = (Rename("a.b_c.weight", "x"), Rename("a_b.c.weight", "y"))
    unclear = Layout(table, {"x": torch.Size((2, 2)), "y": torch.Size((2, 2))})
    lora = Lora("file", {Target("a_b_c", flat=True): Difference(torch.ones(2, 2))})
    with pytest.raises(CheckpointError, match=r"a_b_c may stand for a\.b_c\.weight or a_b\.c\.weight"):
        fit(lora, {"only": unclear}, "the model")


def test_one_tensor_by_two_names_is_refused() -> None:
    update = Difference(torch.ones(4, 5))
    lora = Lora("file", {Target("b_1.q"): update, Target("b_1_q", flat=True): update})
    with pytest.raises(CheckpointError, match=r"file adds to b_1\.q\.weight twice: b_1\.q and b_1_q"):
        fit(lora, {"only": LAYOUT}, "the model")


def test_the_layout_is_the_one_that_knows_all_names() -> None:
    other = Layout((Rename("z.weight", "ours.a.weight"),), {"ours.a.weight": torch.Size((4, 6))})
    layouts = {"first": LAYOUT, "second": other}
    update = Difference(torch.ones(4, 6))
    for name in ("a", "z"):
        (part,) = fit(Lora("x", {Target(name): update}), layouts, "the model")
        assert part.name == "ours.a.weight"
    with pytest.raises(CheckpointError, match=r"does not fit the model: 1 of its 2 updates have no place there \(z\)!"):
        fit(Lora("x", {Target("a"): update, Target("z"): update}), layouts, "the model", lambda lora, fitting: "!")


def test_shapes_that_hold_the_same_numbers_are_taken() -> None:
    def added(down: Tensor) -> Tensor:
        lora = Lora("x", {Target("patch"): LowRank(down, torch.ones(5, 2), 1.0)})
        return total(fit(lora, {"only": LAYOUT}, "the model"))["embed.weight"]

    kernel = torch.randn(2, 2, 1, 3)
    assert torch.equal(added(kernel.flatten(1)), added(kernel))
    linear = torch.randn(2, 6)
    lora = Lora("x", {Target("a"): LowRank(linear[..., None, None], torch.ones(4, 2), 1.0)})
    assert torch.equal(total(fit(lora, {"only": LAYOUT}, "m"))["ours.a.weight"], torch.ones(4, 2) @ linear)
    for down in (torch.ones(2, 2, 3, 1), torch.ones(2, 5), torch.ones(2, 3, 1, 2)):
        with pytest.raises(CheckpointError, match=r"made for another size of the model: 1 of its 1 .*\(patch \(5, "):
            added(down)


def test_what_the_model_does_not_need_is_passed_over() -> None:
    lora = Lora("x", {Target("unused.norm"): Difference(torch.ones(1)), Target("a"): Difference(torch.ones(4, 6))})
    with pytest.raises(CheckpointError, match="unused"):  # a field never spans a dot
        fit(lora, {"only": LAYOUT}, "the model")
    lora = Lora("x", {Target("unused", "bias"): Difference(torch.ones(1)), Target("a"): Difference(torch.ones(4, 6))})
    assert [part.name for part in fit(lora, {"only": LAYOUT}, "the model")] == ["ours.a.weight"]
