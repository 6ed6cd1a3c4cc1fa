"""Rewards to advantages, normalised within the group of each prompt."""
