"""Floor 3: pictures, video and sound, from files to tensors and back (PyAV and Pillow)."""
