"""Attention of one new token per row, as text is decoded, with its log-sum-exp."""
