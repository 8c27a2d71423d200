"""The layers, one family a file, forward beside backward."""
