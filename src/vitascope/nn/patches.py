"""Video latents to tokens and back, and the noise level of each token.

B clips, C channels, T frames, H x W latents; patches of (pt, ph, pw) latents make t x h x w tokens of V numbers.
"""

from __future__ import annotations

from torch import Tensor

from vitascope.core.errors import ShapeError
from vitascope.core.shapes import nearest_multiples
from vitascope.core.tracks import Track

Patch = tuple[int, int, int]


def patchify(values_BCTHW: Tensor, patch: Patch) -> Tensor:
    """(B, t, h w, V), the V numbers ordered as (C, pt, ph, pw): a kernel without overlap, flattened, reads them."""
    (pt, ph, pw), (batch, channels, frames, rows, columns) = patch, values_BCTHW.shape
    cut = values_BCTHW.reshape(batch, channels, frames // pt, pt, rows // ph, ph, columns // pw, pw)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(2, 3)


def unpatchify(x: Tensor, patch: Patch, shape: tuple[int, ...], *, channels_last: bool = False) -> Tensor:
    """Tokens (B, t, h w, V) or (B, t h w, V) to (B, C, T, H, W) = `shape`; V ordered as (C, pt, ph, pw), or with the
    channels last."""
    (pt, ph, pw), (batch, channels, frames, rows, columns) = patch, shape
    grid = (batch, frames // pt, rows // ph, columns // pw)
    if channels_last:
        return x.reshape(*grid, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(shape)
    return x.reshape(*grid, channels, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(shape)


def check_patch(name: str, sizes: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """Raise ShapeError, naming the nearest sizes, unless `sizes` are filled by patches."""
    for size, step in zip(sizes, patch, strict=True):
        if size % step:
            near = ", ".join(map(str, nearest_multiples(size, step)))
            raise ShapeError(f"{name} latents {tuple(sizes)} do not fill patches {patch}; nearest: {near}")


def token_levels(track: Track, patch: Patch) -> Tensor:
    """Mean noise level of every video token, (B, 1|t, 1|h w), as small as the levels of `track` allow.

    Levels may be given once for an axis (size 1); rows and columns are reduced together. Raises ShapeError for levels
    of another number of frames.
    """
    levels_BTHW, (frames, rows, columns) = track.noise[:, 0], track.values.shape[2:]
    if levels_BTHW.shape[1] not in (1, frames):
        raise ShapeError(f"levels of {levels_BTHW.shape[1]} frames do not fit a track of {frames}")
    if levels_BTHW.shape[1] > 1 and patch[0] > 1:
        levels_BTHW = levels_BTHW.unflatten(1, (-1, patch[0])).mean(2)
    if levels_BTHW.shape[2:] == (1, 1):
        return levels_BTHW.flatten(2)
    levels_BTHW = levels_BTHW.expand(-1, -1, rows, columns)
    cut = levels_BTHW.unflatten(2, (-1, patch[1])).unflatten(4, (-1, patch[2]))
    return cut.mean((3, 5)).flatten(2)
