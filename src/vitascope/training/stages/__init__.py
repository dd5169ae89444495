"""What can be trained: one module per stage, each holding its options, its data and its loss."""
