"""Mochi 1: an asymmetric dual-stream denoiser, text and video in one attention."""
