"""Mistakes planted by a machine in every backward of the library."""
