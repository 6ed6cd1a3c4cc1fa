"""Whole pictures: the engine against the reference's algorithm. `python -m bench.generate`."""
