"""Measurements: `python -m bench`. Nothing in the package imports this."""
