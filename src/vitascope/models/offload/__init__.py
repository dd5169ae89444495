"""Models whose weights are in the memory of their device only while they are needed."""
