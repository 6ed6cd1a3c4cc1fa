"""Attention of packed new tokens to what their rows have read, and to each other.

A row is a context and the new tokens after it. What a context shares with others (its runs) is held once: all
rows that share a run attend to it together, each row to the rest (its tail) and to its new tokens by itself,
and both are merged by their log-sum-exps. How a context is parted follows from itself alone, so that a row's
numbers do not depend on who shares with it.
"""

from realign.runtime.attention.backends import BACKENDS, Backend, find_backend
from realign.runtime.attention.plan import ContextAttention, order_rows
from realign.runtime.attention.rows import group_rows, pack_rows

__all__ = [
    "BACKENDS",
    "Backend",
    "ContextAttention",
    "find_backend",
    "group_rows",
    "order_rows",
    "pack_rows",
]
