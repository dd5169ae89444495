"""A procedural theatre: captioned clips with sound and exact ground truth, rendered from a seed, nothing stored."""
