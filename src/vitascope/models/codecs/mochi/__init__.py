"""The video codec of Mochi 1: 6 x 8 x 8, 12 channels."""
