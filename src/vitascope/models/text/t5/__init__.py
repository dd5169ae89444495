"""T5 and umT5 text encoders of public checkpoints, through `transformers`."""
