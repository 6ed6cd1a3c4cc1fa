"""Which rows are worked on together, and how far they are padded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

# Contexts are padded to multiples of this many tokens, or, where that is more, of a sixteenth to an eighth of
# their length; causal new tokens to multiples of `NEW_MULTIPLE`.
PAST_MULTIPLE, NEW_MULTIPLE = 64, 16


def padded_length(length: int) -> int:
    """The tokens that a context is padded to: a function of its own length, so that its sums are its own.

    (A longer padding is masked all the same, but where a sum is cut into vectors moves its last bits.)
    """
    multiple = max(PAST_MULTIPLE, 2 ** (length.bit_length() - 4)) if length else 1
    return -(-length // multiple) * multiple


def padded_new(length: int, is_causal: bool) -> int:
    """The same of new tokens. Pictures come in few sizes, and are not padded."""
    return -(-length // NEW_MULTIPLE) * NEW_MULTIPLE if is_causal else length


def group_rows(keys: Sequence[Hashable]) -> list[list[int]]:
    """The rows of each key, in their order."""
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def pack_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split rows, longest first, into parts that have at most `max_tokens` tokens when padded."""
    packs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if packs and (len(packs[-1]) + 1) * lengths[packs[-1][0]] <= max_tokens:
            packs[-1].append(row)
        else:
            packs.append([row])
    return [sorted(pack) for pack in packs]
