"""Losses, each with its backward: the start of every backward pass."""
