"""Weights from and to PyTorch and Flax: one table of names and orders of axes, and how a net finds its places."""

from fnbp.exchange.weights import from_flax, from_torch, to_flax, to_torch

__all__ = ["from_flax", "from_torch", "to_flax", "to_torch"]
