"""Training with optax: fit.py asks and reports, loop.py is what is compiled."""
