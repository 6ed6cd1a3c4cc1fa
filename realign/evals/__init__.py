"""Measurements of a model, one benchmark per file."""
