"""Losses as functions of tensors, apart from data, models and the loop."""
