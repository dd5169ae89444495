"""Random numbers that depend on a seed and a path of names alone, never on global state or call order."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *path: str | int) -> int:
    """Fold `path` into `seed`: a 63-bit seed that is the same on every machine and in every process."""
    text = "/".join([str(seed), *(str(part) for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *path: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded by `derive_seed(seed, *path)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *path))
