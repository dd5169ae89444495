"""A text encoder over UTF-8 bytes, trained along with the denoiser."""
