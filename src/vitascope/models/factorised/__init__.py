"""The factorised denoiser: spatial, then temporal attention, with an audio track joined to the video."""
