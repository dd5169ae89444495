"""Image encoders, one folder per family."""
