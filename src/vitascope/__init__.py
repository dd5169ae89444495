"""Vitascope: video with sound from text, images, audio or other video."""

__version__ = "0.1.0"
