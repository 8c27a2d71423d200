"""The known mistakes of hand-written backwards."""
