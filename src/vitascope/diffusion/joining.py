"""Clips, and what they are told, one after the other along a batch.

B clips, S text tokens, D text width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vitascope.core.errors import InputError
from vitascope.core.tracks import TextContext, Track, Tracks


def join_tracks(items: list[Tracks]) -> dict[str, Track]:
    """Tracks of equal shapes one after the other along the batch; noise levels of batch 1 are spread first."""
    if len(items) == 1:
        return dict(items[0])
    joined: dict[str, Track] = {}
    for name, track in items[0].items():
        values = torch.cat([item[name].values for item in items])
        noise = [item[name].noise for item in items]
        shape = torch.broadcast_shapes(*(level.shape[1:] for level in noise))
        sizes = [item[name].values.shape[0] for item in items]
        levels = [level.expand(size, *shape) for level, size in zip(noise, sizes, strict=True)]
        conditions = [item[name].condition for item in items]
        given = [condition for condition in conditions if condition is not None]
        if given and len(given) != len(items):
            raise InputError("clips with and without a condition cannot be joined")
        joined[name] = Track(values, torch.cat(levels), track.times_s, torch.cat(given) if given else None)
    return joined


def join_texts(texts: list[TextContext]) -> TextContext:
    """Texts one after the other along the batch, padded with masked zeros to the longest.

    Raises InputError where some of them have an image, or were prepared, and others not.
    """
    if len(texts) == 1:
        return texts[0]
    if len({(text.image is None, len(text.prepared)) for text in texts}) > 1:
        raise InputError("texts with and without an image, or prepared and not, cannot be joined")
    images = [text.image for text in texts if text.image is not None]
    return TextContext(
        _stack([text.embeddings for text in texts]),
        _stack([text.mask for text in texts]),
        _stack(images) if images else None,
        tuple(_stack(list(parts)) for parts in zip(*(text.prepared for text in texts), strict=True)),
    )


def _stack(parts: list[Tensor]) -> Tensor:
    """Tensors (B, S, ...) one after the other, padded with zeros (False) to the longest S."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([functional.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts])
