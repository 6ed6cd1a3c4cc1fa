"""Attention to two disjoint sets of keys, from attention to each."""
