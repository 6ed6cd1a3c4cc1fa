"""Reading a prompt: what has been read does not depend on how it was cut."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from PIL import Image

from realign.runtime.context import MAX_TEXT_TOKENS, build_text_block, extend, split_text_block
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.prepare import crop_picture
from realign.runtime.reader import Reader, Reading
from realign.runtime.request import ImagePart, TextPart
from realign.runtime.settings import TextSettings
from realign.runtime.text import decode_text


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
    reader = Reader(model, crop_picture, max_tokens=100_000, run_tokens=10**9)
    twice, once = reader.read([Reading((TextPart(text), TextPart("a mug"))), Reading((TextPart(text),))])
    check_same(once, extend(model, [Context()], [block])[0])
    assert max(segment.key_NLKD.shape[1] for segment in twice.segments) <= MAX_TEXT_TOKENS
    assert twice.segments[: len(once.segments)] == once.segments  # what they share is there once


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_a_written_text_is_the_text_read(model, temperature):
    """Texts that end, or are cut; those that encode to other tokens than were written are read anew."""
    reader = Reader(model, crop_picture, max_tokens=100_000, run_tokens=10**9)
    starts = reader.read([Reading((TextPart("a lamp, " * (row % 3)),)) for row in range(12)])
    settings = [TextSettings(row + 1, temperature) for row in range(12)]
    keys = [NoiseKey(row, "text", stream="text") for row in range(12)]
    written = decode_text(model, starts, settings, keys)
    finished = reader.finish(starts, written)
    assert [one.turn for one in finished] == [one.turn for one in written]
    pairs = zip(written, starts, strict=True)
    again = reader.read([Reading((TextPart(one.turn.text),), start) for one, start in pairs])
    for one, before, context in zip(finished, written, again, strict=True):
        assert one.rest == ()
        check_same(one.context, context)
        is_kept = one.context.segments[: len(before.context.segments)] == before.context.segments
        assert is_kept == (tuple(model.tokenizer.encode(one.turn.text)) == one.turn.ids)


def test_both_kinds_of_written_text_occur(model):
    """The test above would be empty if all texts encoded alike."""
    starts = [Context()] * 40
    keys = [NoiseKey(row, "text", stream="text") for row in range(40)]
    written = decode_text(model, starts, [TextSettings(1 + row // 8, 2.0) for row in range(40)], keys)
    same = {tuple(model.tokenizer.encode(one.turn.text)) == one.turn.ids for one in written}
    assert same == {True, False}


def test_what_was_read_is_found_as_long_as_it_is_held(model, monkeypatch):
    """And then forgotten: contexts, pictures and their blocks."""
    reader = Reader(model, crop_picture, max_tokens=100_000)
    parts = (ImagePart(Image.new("RGB", (16, 24), "red")), TextPart("a mug"))
    (short,) = reader.read([Reading(parts[:1])])
    extended = []
    monkeypatch.setattr(
        "realign.runtime.reader.extend",
        lambda model, contexts, blocks, *rest: (
            extended.extend(blocks) or extend(model, contexts, blocks, *rest)
        ),
    )
    (long,) = reader.read([Reading(parts)])
    assert long.segments[: len(short.segments)] == short.segments
    assert [block.length for block in extended] == [build_text_block(model, "a mug").length]
    assert reader.read([Reading(parts[:1]), Reading(parts)]) == [short, long]
    assert len(extended) == 1
    assert len(reader.reached) == 3
    del short, long
    gc.collect()
    assert not [*reader.reached, *reader.shared, *reader.pictures]


def test_what_a_run_was_made_of_is_not_held_beside_it(model):
    reader = Reader(model, crop_picture, max_tokens=100_000, run_tokens=1)
    (start,) = reader.read([Reading((TextPart("a lamp " * 9),))])
    picture = ImagePart(Image.new("RGB", (16, 24), "red"))
    reading = Reading((picture, TextPart("a mug")), start)
    (end,) = reader.read([reading])
    assert reader.read([reading]) == [end]  # found again while its start is there
    (tail,) = map(weakref.ref, start.tail)
    del start, reading
    gc.collect()
    assert tail() is None
    assert reader.count_held() == end.length


def test_a_picture_that_is_met_twice_at_a_time_is_met_once(model):
    """The slower of two threads takes what the other has put there."""
    fast_is_done = threading.Event()

    def fit(image, config):
        if threading.current_thread().name == "slow":
            assert fast_is_done.wait(60)
        return crop_picture(image, config)

    reader, found = Reader(model, fit, max_tokens=100_000), []
    image = Image.new("RGB", (16, 24), "red")
    slow = threading.Thread(target=lambda: found.append(reader.meet(ImagePart(image))), name="slow")
    slow.start()
    met = reader.meet(ImagePart(image))
    fast_is_done.set()
    slow.join()
    assert found == [met]
    assert reader.meet(ImagePart(image)) is met
