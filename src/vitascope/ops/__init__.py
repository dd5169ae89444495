"""Floor 1: attention backends and rotary positions, without parameters."""
