"""Norm of queries and keys by expert and their rotary embedding, written to where they are read."""
