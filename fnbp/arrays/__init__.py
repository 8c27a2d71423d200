"""What every layer asks of its arrays: are they as expected, which positions count, where they lie, exact sums."""
