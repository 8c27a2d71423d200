"""Layers, one family a file, forward beside backward."""
