"""Floor 3: one clip made by several processes (torch.distributed): shared tokens, shared matrices, shared frames."""
