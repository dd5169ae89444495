"""Wan 2.1: text (and image) to video."""
