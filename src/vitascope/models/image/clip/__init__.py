"""The CLIP vision encoder of Wan 2.1 image-to-video, through `transformers`."""
