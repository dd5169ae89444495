"""Exponential moving average of a model's weights, kept in fp32 whatever the model's precision."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Averages of parameters; buffers are copied as they are. Step it once per optimiser step.

    The decay grows as min(decay, (1 + n) / (10 + n)) over the updates n, so that early averages are not the
    initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._averages = {name: value.detach().clone().float() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the model's weights: average += (1 - decay_n) (weight - average)."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = dict(model.named_parameters())
        averages = list(self._averages.values())
        weights = [parameters[name].detach().float() for name in self._averages]
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def model(self, like: nn.Module) -> nn.Module:
        """A copy of `like` in eval mode with the averaged weights (and the current buffers), without gradients."""
        averaged = copy.deepcopy(like).eval().requires_grad_(False)
        for name, parameter in averaged.named_parameters():
            parameter.copy_(self._averages[name])
        return averaged

    def state_dict(self) -> dict[str, Tensor | int]:
        """Averages by parameter name, and the number of updates."""
        return {**self._averages, "num_updates": self.num_updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Take over what `state_dict` gave; the names must be the same."""
        names = {name for name in state if name != "num_updates"}
        if names != self._averages.keys():
            raise KeyError(f"averages of other parameters: {sorted(names ^ self._averages.keys())[:5]}")
        self.num_updates = int(state["num_updates"])
        for name, average in self._averages.items():
            value = state[name]
            assert isinstance(value, Tensor)
            average.copy_(value)
