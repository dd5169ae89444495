"""Matrices kept in fewer bits against what they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitascope.core.errors import InputError
from vitascope.nn.storage import Storage, narrow, stored_bytes


def widened(tensor: Tensor, storage: Storage, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(tensor.shape, dtype=dtype)
    narrow(tensor, storage).widen(out)
    return out


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(7, 33), (4, 3, 1, 2, 2)])
def test_what_is_kept_comes_back_within_the_rounding(shape: tuple[int, ...]) -> None:
    rows = draw(*shape) * 10.0 ** torch.arange(-3, shape[0] - 3).view(-1, *[1] * (len(shape) - 1))
    assert torch.equal(widened(rows, "as_is"), rows)
    # 8 bits of fraction, half a unit: 2^-9 of each value
    assert ((widened(rows, "bf16") - rows).abs() <= rows.abs() * 2**-8).all()
    # 3 bits of fraction: 2^-4 of a value, or half the smallest step, 2^-10, of a row's scale
    largest = rows.abs().amax(tuple(range(1, rows.ndim)), keepdim=True)
    bound = (rows.abs() * 2**-4).maximum(largest / 448 * 2**-10) * 1.001
    error = (widened(rows, "fp8") - rows).abs()
    assert (error <= bound).all()
    assert error.max() > 0


def test_values_that_have_few_bits_lose_nothing_in_bf16() -> None:
    rows = draw(5, 9).bfloat16()
    assert torch.equal(widened(rows.float(), "bf16"), rows.float())
    assert torch.equal(widened(rows.float(), "bf16", torch.bfloat16), rows)


@pytest.mark.parametrize("storage", ["as_is", "bf16", "fp8"])
def test_zero_rows_vectors_and_sizes(storage: Storage) -> None:
    assert not widened(torch.zeros(3, 4), storage).any()
    vector, numbers = draw(5), torch.arange(6).view(2, 3)
    assert torch.equal(widened(vector, storage), vector)
    assert torch.equal(narrow(numbers, storage).values, numbers)
    small = narrow(draw(16, 32), storage)
    assert small.num_bytes == {"as_is": 2048, "bf16": 1024, "fp8": 512 + 64}[storage]
    assert stored_bytes((16, 32), torch.float32, storage) == small.num_bytes


def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(InputError, match="valid values: as_is, bf16, fp8"):
        narrow(draw(2, 2), "int4")  # pyright: ignore[reportArgumentType]
