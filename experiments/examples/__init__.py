"""Short programs to copy from: python -m experiments.examples.NAME."""
