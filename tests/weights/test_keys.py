"""Key tables: every rule undone by itself, and every way in which names may not fit told by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitascope.core.errors import CheckpointError
from vitascope.weights import keys
from vitascope.weights.keys import (
    Drop,
    Flatten,
    Fuse,
    KeyTable,
    Rename,
    Split,
    Squeeze,
    Swap,
    convert,
    is_dropped,
    plan,
)

TABLE: KeyTable = (
    Rename("block_{n}.up.{leaf}", "layers.{n}.rise.{leaf}"),
    Fuse(("block_{n}.q", "block_{n}.k", "block_{n}.v"), "layers.{n}.qkv"),
    Fuse(("block_{n}.wide", "block_{n}.slim"), "layers.{n}.both", (3, 1)),
    Split("mix.{n}", ("layers.{n}.a", "layers.{n}.b"), (1, 2)),
    Swap("final", "head"),
    Flatten("patch", "embed", (2, 1, 3)),
    Squeeze("table.{n}", "layers.{n}.table", 1),
    Squeeze("gamma", "norm", -2),
    Drop("unused.{anything}"),
)


def theirs() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for n in range(3):
        tensors |= {f"block_{n}.{part}": torch.randn(2, 3) for part in "qkv"}
        tensors |= {f"block_{n}.wide": torch.randn(6, 2), f"block_{n}.slim": torch.randn(2, 2)}
        tensors |= {f"block_{n}.up.weight": torch.randn(2, 2), f"block_{n}.up.bias": torch.randn(2)}
        tensors |= {f"mix.{n}": torch.randn(6, 2), f"table.{n}": torch.randn(1, 4, 2)}
    return {**tensors, "final": torch.arange(6.0), "patch": torch.randn(4, 2, 1, 3), "gamma": torch.randn(5, 1, 1)}


def test_reading_renames_fuses_splits_swaps_flattens_squeezes_and_drops() -> None:
    given = theirs()
    ours = convert(TABLE, {**given, "unused.thing": torch.ones(1)})
    assert set(ours) == {"head", "embed", "norm"} | {
        f"layers.{n}.{part}"
        for n in range(3)
        for part in ("rise.weight", "rise.bias", "qkv", "both", "a", "b", "table")
    }
    assert torch.equal(ours["layers.1.qkv"], torch.cat([given[f"block_1.{part}"] for part in "qkv"]))
    assert torch.equal(ours["layers.2.both"], torch.cat([given["block_2.wide"], given["block_2.slim"]]))
    assert torch.equal(ours["layers.0.a"], given["mix.0"][:2])
    assert torch.equal(ours["layers.0.b"], given["mix.0"][2:])
    assert ours["head"].tolist() == [3, 4, 5, 0, 1, 2]
    assert torch.equal(ours["embed"], given["patch"].flatten(1))
    assert torch.equal(ours["layers.1.table"], given["table.1"][0])
    assert torch.equal(ours["norm"], given["gamma"][:, 0, 0])


def test_writing_undoes_reading() -> None:
    given = theirs()
    back = convert(TABLE, convert(TABLE, given), writing=True)
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], given[name]) for name in given)


@given(st.sampled_from(sorted(theirs())))
def test_no_tensor_may_be_missing_from_its_companions(name: str) -> None:
    rest = {key: value for key, value in theirs().items() if key != name}
    companions = any(name in move.theirs and len(move.theirs) > 1 for move in plan(TABLE, theirs()))
    if companions:
        with pytest.raises(CheckpointError, match=rf"1 missing \({name}\)"):
            convert(TABLE, rest, label="model.safetensors")
    else:
        assert len(convert(TABLE, rest)) < len(convert(TABLE, theirs()))


def test_unknown_names_are_told_with_their_number() -> None:
    extra = {f"lora.{n}": torch.ones(1) for n in range(5)}
    message = r"the tensors of model\.bin do not fit: 5 unknown \(lora\.0, lora\.1, lora\.2, \.\.\.\)"
    with pytest.raises(CheckpointError, match=message):
        convert(TABLE, {**theirs(), **extra}, label="model.bin")


def test_a_name_that_two_rules_write_is_refused() -> None:
    table = (Rename("a", "x"), Rename("b", "x"))
    assert set(convert(table, {"a": torch.ones(1)})) == {"x"}
    with pytest.raises(CheckpointError, match=r"1 twice \(x\)"):
        convert(table, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"1 twice \(a\)"):
        convert((Rename("a", "x"), Rename("a", "y")), {"a": torch.ones(1)})


def test_shapes_that_a_rule_cannot_take_are_told() -> None:
    with pytest.raises(CheckpointError, match=r"patch has the shape \(4, 2, 3\), expected \(4, 2, 1, 3\)"):
        convert(TABLE, {"patch": torch.ones(4, 2, 3)})
    with pytest.raises(CheckpointError, match=r"mix\.0.*\(5, 2\) cannot be cut"):
        convert((Split("mix.0", ("a", "b")),), {"mix.0": torch.ones(5, 2)})
    with pytest.raises(CheckpointError, match=r"gamma has the shape \(5, 2, 1\)"):
        convert(TABLE, {"gamma": torch.ones(5, 2, 1)})


def test_a_field_never_spans_a_dot() -> None:
    with pytest.raises(CheckpointError, match="unknown"):
        convert(TABLE, {"unused.a.b": torch.ones(1)})


RULES: dict[str, tuple[Rename | Fuse | Split, list[tuple[int, ...]]]] = {
    "Rename": (Rename("a", "b"), [(4, 3)]),
    "Swap": (Swap("a", "b"), [(4, 3)]),
    "Fuse": (Fuse(("a", "b"), "c", (3, 1)), [(6, 3), (2, 3)]),
    "Split": (Split("a", ("b", "c"), (1, 2)), [(6, 3)]),
    "Flatten": (Flatten("a", "b", (2, 1, 3)), [(4, 2, 1, 3)]),
    "Squeeze": (Squeeze("a", "b", -2), [(4, 3, 1, 1)]),
}


@pytest.mark.parametrize("name", RULES)
def test_factors_go_through_a_rule_as_it_says(name: str) -> None:
    """read(up @ down) is read(up) @ down where a rule moves rows, and up @ read(down) where it reshapes them."""
    rule, shapes = RULES[name]
    ups = [torch.randn(shape[0], 5) for shape in shapes]
    down = torch.randn(5, *shapes[0][1:])  # the same for all, as the products are stacked
    whole = rule.read([torch.einsum("or,r...->o...", up, down) for up in ups])
    if rule.acts_on == "rows":
        parts = [up @ down.flatten(1) for up in rule.read(ups)]
    else:
        parts = [ups[0] @ rule.read([down])[0].flatten(1)]
    for product, part in zip(whole, parts, strict=True):
        torch.testing.assert_close(product.flatten(1), part)


def test_every_kind_of_rule_says_what_it_acts_on() -> None:
    """A new one must be put into RULES, or shown here to take no factors."""
    kinds = {name: kind for name, kind in vars(keys).items() if isinstance(kind, type) and hasattr(kind, "acts_on")}
    assert set(kinds) == {*RULES, "Drop"}
    assert Squeeze("a", "b", 1).acts_on == Drop("a").acts_on == "whole"


def test_dropped_names() -> None:
    assert is_dropped(TABLE, "unused.thing")
    assert not is_dropped(TABLE, "gamma")
