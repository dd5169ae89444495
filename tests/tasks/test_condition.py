"""The mask of known frames by latent frame."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vitascope.tasks.condition import frame_mask


@given(known=st.lists(st.booleans(), min_size=1, max_size=9), stride=st.integers(1, 4))
def test_every_frame_has_its_place(known: list[bool], stride: int) -> None:
    frames = torch.tensor([*known[:1], *(frame for frame in known[1:] for _ in range(stride))])
    frames[-1] = known[0]
    mask = frame_mask(frames, stride)
    assert mask.shape == (stride, len(known))
    assert (mask[:, 0] == frames[0]).all()
    assert torch.equal(mask[:, 1:].T.flatten(), frames[1:])
