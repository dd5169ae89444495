"""Paths from data to noise, level lists, guidance and samplers, all over a noise level per cell."""
