"""Backwards that other people published, and what compare finds in them."""
