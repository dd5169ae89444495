"""The penalty on a codec's bottleneck."""

from __future__ import annotations

from torch import Tensor


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean over all cells of KL(N(mean, variance) || N(0, 1)) in nats. Source: Kingma and Welling 2014, appendix B."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
