"""Reading a prompt: what has been read does not depend on how it was cut."""

from __future__ import annotations

import pytest
import torch

from realign.runtime.context import MAX_TEXT_TOKENS, Context, build_text_block, extend, split_text_block
from realign.runtime.prepare import crop_picture
from realign.runtime.reader import Reader, Reading
from realign.runtime.request import TextPart


def check_same(context: Context, other: Context) -> None:
    assert (context.length, context.next_position) == (other.length, other.next_position)
    for ours, theirs in ((context.key(-1), other.key(-1)), (context.value(-1), other.value(-1))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_text_in_pieces(model, size):
    block = build_text_block(model, "put the mug next to the lamp")
    (whole,) = extend(model, [Context()], [block])
    pieces = split_text_block(block, size)
    assert max(piece.length for piece in pieces) <= size
    context = Context()
    for piece in pieces:
        (context,) = extend(model, [context], [piece])
    check_same(context, whole)


def test_a_long_text_is_read_in_pieces(model):
    text = "put the mug next to the lamp " * 60
    block = build_text_block(model, text)
    assert block.length > MAX_TEXT_TOKENS
    reader = Reader(model, crop_picture, max_tokens=100_000)
    twice, once = reader.read([Reading((TextPart(text), TextPart("a mug"))), Reading((TextPart(text),))])
    check_same(once, extend(model, [Context()], [block])[0])
    assert max(segment.key_NLKD.shape[1] for segment in twice.segments) <= MAX_TEXT_TOKENS
    assert twice.segments[: len(once.segments)] == once.segments  # what they share is there once
