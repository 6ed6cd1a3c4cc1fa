"""Guidance and sampler step in one op."""
