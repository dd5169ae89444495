"""The latent up-sampler of LTX-Video."""
