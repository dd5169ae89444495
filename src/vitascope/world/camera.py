"""The camera: a pinhole before parallel layers (2.5-D), each a plane facing the camera at its own depth.

At rest the camera stands at z = -STAGE_DISTANCE and the stage (z = 0) fills the frame as `scene.py` says, so the
focal length in half frame heights is f = STAGE_DISTANCE. A point (X, Y) of a layer at depth z appears, in half frame
heights from the middle of the frame, at

    (u, v) = s (X, Y) + shift,    s = f / (z - cz),    shift = -s (cx, cy) + f (-tan yaw, tan pitch)

with f = 1 / tan(fov / 2). Turning the camera thus moves every layer alike; keystone distortion is left out.

- pans: the yaw (or pitch) grows; "pans right" turns right, so the scene moves left; "pans up" moves it down.
- zooms: the field of view narrows or widens; every layer scales alike, no parallax.
- dollies: the camera travels along z, its distance to the stage shrinking or growing by the same factor every second;
  near layers scale more than far ones.
- orbits: the camera travels sideways and turns so that the middle of the stage stays in the middle of the frame:
  tan yaw = -cx / f. "Orbits right" goes right (cx > 0) and turns left, so what lies behind the stage moves right in the
  frame and what lies before it moves left.

Every move passes its rest position at REST_S, so that subjects stay in the frame on both sides of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from vitascope.core.shapes import ClipFormat
from vitascope.world.motion import frame_times
from vitascope.world.scene import Scene

STAGE_DISTANCE = 4.0
REST_S = 1.0
"""When a moving camera is where the static one always is."""

PAN_PER_S = 0.4
"""Half frame heights a second."""
ZOOM_PER_S = log(1.6) / 2
DOLLY_PER_S = log(1.5) / 2
"""Growth of the stage a second (natural logarithm)."""
ORBIT_PER_S = 0.5
"""World units a second sideways."""


@dataclass(frozen=True)
class CameraPath:
    """position (T, 3) x, y, z in world units; rotation (T, 3) yaw (right), pitch (up), roll in radians; fov_deg (T,),
    the vertical field of view in degrees."""

    position: Tensor
    rotation: Tensor
    fov_deg: Tensor


def camera_path(scene: Scene, fmt: ClipFormat) -> CameraPath:
    """Where the camera of `scene` is at every frame, float32."""
    time = (frame_times(fmt) - REST_S) * scene.camera_speed
    verb, _, direction = scene.camera.partition(" ")
    sign = {"left": -1.0, "up": 1.0, "down": -1.0, "out": -1.0, "backward": -1.0}.get(direction, 1.0)
    position = torch.zeros(len(time), 3, dtype=torch.float64)
    position[:, 2] = -STAGE_DISTANCE
    rotation = torch.zeros_like(position)
    focal = torch.full_like(time, STAGE_DISTANCE)
    if verb == "pans":
        axis = 0 if direction in ("left", "right") else 1
        rotation[:, axis] = torch.atan(sign * PAN_PER_S * time / STAGE_DISTANCE)
    elif verb == "zooms":
        focal = focal * torch.exp(sign * ZOOM_PER_S * time)
    elif verb == "dollies":
        position[:, 2] *= torch.exp(-sign * DOLLY_PER_S * time)
    elif verb == "orbits":
        position[:, 0] = sign * ORBIT_PER_S * time
        rotation[:, 0] = torch.atan(-position[:, 0] / STAGE_DISTANCE)
    fov_deg = torch.rad2deg(2.0 * torch.atan(1.0 / focal))
    return CameraPath(position.float(), rotation.float(), fov_deg.float())


def focal_length(path: CameraPath) -> Tensor:
    """Focal length in half frame heights, (T,)."""
    return 1.0 / torch.tan(torch.deg2rad(path.fov_deg) / 2.0)


def turn_shift(path: CameraPath) -> Tensor:
    """How far turning the camera moves the picture, (T, 2) in half frame heights (pitch up moves it down)."""
    focal = focal_length(path)
    yaw, pitch = path.rotation[:, 0], path.rotation[:, 1]
    return torch.stack([-focal * torch.tan(yaw), focal * torch.tan(pitch)], 1)


def layer_transform(path: CameraPath, depth: float) -> tuple[Tensor, Tensor]:
    """Scale (T,) and shift (T, 2) that take a point of the layer at `depth` (world units) into the frame, in half frame
    heights from its middle: frame = scale * point + shift. The layer must stay before the camera."""
    scale = focal_length(path) / (depth - path.position[:, 2])
    return scale, turn_shift(path) - scale[:, None] * path.position[:, :2]


def rest_scale(depth: float) -> float:
    """Scale of the layer at `depth` when the camera is at rest."""
    return STAGE_DISTANCE / (depth + STAGE_DISTANCE)
