"""Linear maps with low-rank updates beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Branch:
    """up @ (down @ x), with up (outputs, r) and down (r, inputs), on `rows` of the outputs: a slice or numbers."""

    rows: slice | Tensor
    down: Tensor
    up: Tensor


class LowRankLinear(nn.Linear):
    """The linear map `base`, and added to its outputs those of the branches (Hu et al. 2021).

    Weight and bias are those of `base` themselves, under the same names; the factors are no part of the state dict and
    have the dtype of the weight. All downward products are one.
    """

    down: Tensor

    def __init__(self, base: nn.Linear, branches: Sequence[Branch]) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.register_buffer("down", torch.cat([branch.down.to(**like) for branch in branches]), persistent=False)
        self._spans: list[slice | None] = []
        for index, branch in enumerate(branches):
            self.register_buffer(f"up_{index}", branch.up.to(**like), persistent=False)
            fixed = branch.rows if isinstance(branch.rows, slice) else None
            self._spans.append(fixed)
            if isinstance(branch.rows, Tensor):
                self.register_buffer(f"rows_{index}", branch.rows.to(base.weight.device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        out, hidden, done = F.linear(input, self.weight, self.bias), F.linear(input, self.down), 0
        for index, span in enumerate(self._spans):
            up = self.get_buffer(f"up_{index}")
            added = F.linear(hidden[..., done : done + up.shape[1]], up)
            done += up.shape[1]
            if span is None:
                out.index_add_(-1, self.get_buffer(f"rows_{index}"), added)
            else:
                out[..., span] += added
        return out
