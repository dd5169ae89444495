"""LTX-Video: text, pictures and clips to video, a noise level for each token."""
