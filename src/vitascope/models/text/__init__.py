"""Text encoders, one folder per family."""
