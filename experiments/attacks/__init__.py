"""Wrong backwards that were written to get past compare, by class."""
