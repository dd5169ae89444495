"""The LTX-Video codec: 8 x 32 x 32, 128 channels, in its three generations."""
