"""Floor 6: recipes, data, the training loop, checkpoints and the stages that plug into them."""
