"""Where in a clip of the world its subjects are, cell by cell: what the denoiser's loss may look at more closely.

A small subject covers a few of a clip's latent cells, and a drawn backdrop has more detail than any subject; a loss
that counts every cell once says little about the shape that the caption names. The best prediction of a cell does not
depend on its weight, so weights only decide what a model of limited size learns first.

T latent frames, h x w latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitascope.core.shapes import ClipFormat, VideoStrides
from vitascope.world.camera import camera_path
from vitascope.world.render import pixel_axes, subject_pose, subject_reach
from vitascope.world.scene import SIZES, Scene


def subject_focus(scene: Scene, fmt: ClipFormat, strides: VideoStrides) -> Tensor:
    """How closely each cell is to be looked at, (T, h, w), 0 away from every subject.

    A cell counts as a subject's if the subject's bounding ellipse reaches its middle in any of the frames that the cell
    stands for, with a cell to spare. A medium subject's cells are 1; others go with the inverse of the radius as
    seen, because the outline, which shows the shape, grows with the radius. strides: of the codec.
    """
    rows, columns = strides.height, strides.width
    path = camera_path(scene, fmt)
    x, y, px = pixel_axes(fmt)
    x_w = x.unflatten(0, (-1, columns)).mean(1)
    y_h = y.unflatten(0, (-1, rows)).mean(1)
    focus = torch.zeros(fmt.num_frames, len(y_h), len(x_w))
    for subject in scene.subjects:
        pose = subject_pose(subject, path, fmt).every_frame(fmt.num_frames)
        reach = subject_reach(subject, pose) + px * torch.tensor([columns, rows])
        across = (x_w - pose.centre[:, :1]) / reach[:, :1]
        down = (y_h - pose.centre[:, 1:]) / reach[:, 1:]
        inside = across.square()[:, None, :] + down.square()[:, :, None] <= 1.0
        closeness = SIZES["medium"] / pose.radius.clamp_min(px)
        focus = torch.maximum(focus, inside * closeness[:, None, None])
    later = focus[1:].unflatten(0, (-1, strides.time)).amax(1)
    return torch.cat([focus[:1], later])
