"""Letters of Shakespeare."""
