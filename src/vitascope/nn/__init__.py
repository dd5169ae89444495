"""Floor 2: layers that families share."""
