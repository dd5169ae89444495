"""The Wan 2.1 video codec: 4 x 8 x 8, 16 channels."""
