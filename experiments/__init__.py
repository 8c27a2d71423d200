"""Experiments: each command proves one claim. `python -m experiments` lists them."""
