"""Published backwards, held against compare."""
