"""What a user asks for, as cells that are known and cells that are not."""
