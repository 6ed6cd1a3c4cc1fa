"""Rotary position embedding on packed heads."""
