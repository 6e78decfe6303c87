"""Trained weights at rest: reading and writing them, ours and those of other libraries, and what they name."""
