"""Optimisers and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import cos, pi
from typing import Any

import torch
from torch import nn

from vitascope.core.errors import TrainingError
from vitascope.training.recipe import OptimizerRecipe, ScheduleRecipe


def learning_rate_factor(step: int, num_steps: int, schedule: ScheduleRecipe) -> float:
    """Learning rate of optimiser step `step` (0 to num_steps - 1) as a fraction of the peak."""
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    final = schedule.final_fraction
    match schedule.kind:
        case "constant":
            return 1.0
        case "trapezoid":
            decay_steps = max(1, round(schedule.decay_fraction * num_steps))
            left = min(1.0, (num_steps - step) / decay_steps)
        case "linear" | "cosine":
            left = (num_steps - step) / max(1, num_steps - schedule.warmup_steps)
    left = min(1.0, max(0.0, left))
    if schedule.kind == "cosine":
        left = 0.5 - 0.5 * cos(pi * left)
    return final + (1 - final) * left


class Optimizers:
    """One or two optimisers stepped together, with one learning-rate factor.

    views: pairs of a parameter and the matrix through which its optimiser sees it; they share their memory.
    """

    def __init__(
        self, parts: dict[str, torch.optim.Optimizer], views: Sequence[tuple[nn.Parameter, nn.Parameter]] = ()
    ) -> None:
        self.parts = parts
        self._views = views
        self._peaks = {name: [group["lr"] for group in part.param_groups] for name, part in parts.items()}

    def set_factor(self, factor: float) -> None:
        """Set every learning rate to `factor` times its peak."""
        for name, part in self.parts.items():
            for group, peak in zip(part.param_groups, self._peaks[name], strict=True):
                group["lr"] = peak * factor

    def step(self) -> None:
        """One step of each optimiser."""
        for parameter, matrix in self._views:
            matrix.grad = None if parameter.grad is None else parameter.grad.reshape(matrix.shape)
        for part in self.parts.values():
            part.step()
        for _, matrix in self._views:
            matrix.grad = None

    def state_dict(self) -> dict[str, Any]:
        """States by optimiser name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over states, not settings: those are of the recipe. Raises TrainingError for states of other
        optimisers."""
        if state.keys() != self.parts.keys():
            raise TrainingError(
                f"the checkpoint holds optimisers {sorted(state)}, the recipe wants {sorted(self.parts)}"
            )
        for name, part in self.parts.items():
            settings = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
            part.load_state_dict(state[name])
            for group, own in zip(part.param_groups, settings, strict=True):
                group.update(own)


def build_optimizers(model: nn.Module, recipe: OptimizerRecipe, device: torch.device) -> Optimizers:
    """The optimisers of a model, which must already be on its device.

    Muon takes a convolution kernel as the matrix of its output channels by all the rest. Weight decay falls on matrices
    and kernels alone, never on vectors, biases, norms or names in `adamw_names`.
    """
    muon, decayed, plain = [], [], []
    views: list[tuple[nn.Parameter, nn.Parameter]] = []
    for name, parameter in _trainable(model):
        special = any(part in name for part in recipe.adamw_names)
        if recipe.name == "muon" and parameter.ndim == 2 and not special:
            muon.append(parameter)
        elif recipe.name == "muon" and parameter.ndim > 2 and not special:
            views.append((parameter, nn.Parameter(parameter.detach().view(len(parameter), -1))))
            muon.append(views[-1][1])
        else:
            (plain if parameter.ndim < 2 or special else decayed).append(parameter)
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, recipe.weight_decay), (plain, 0.0))
        if params
    ]
    parts: dict[str, torch.optim.Optimizer] = {}
    if groups:
        parts["adamw"] = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=device.type in ("cpu", "cuda")
        )
    if muon:
        parts["muon"] = torch.optim.Muon(
            muon,
            lr=recipe.learning_rate if recipe.muon_learning_rate is None else recipe.muon_learning_rate,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
    if not parts:
        raise TrainingError("the model has no trainable parameters")
    return Optimizers(parts, views)


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
