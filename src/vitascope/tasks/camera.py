"""Camera moves by name, as paths that a denoiser takes."""

from __future__ import annotations

import torch
from torch import Tensor

from vitascope.core.errors import choice
from vitascope.core.shapes import ClipFormat
from vitascope.world.camera import camera_path
from vitascope.world.scene import CAMERAS, Scene


def named_camera_path(name: str, fmt: ClipFormat) -> Tensor:
    """The path (T, 7) of a move such as "pans right": position in world units, yaw, pitch and roll in radians, field of
    view in degrees. Raises InputError naming the moves there are."""
    path = camera_path(Scene((), camera=choice("camera", name, CAMERAS)), fmt)
    return torch.cat([path.position, path.rotation, path.fov_deg[:, None]], dim=1)
