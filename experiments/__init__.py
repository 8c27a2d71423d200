"""One runnable file a claim: python -m experiments.NAME --help."""
