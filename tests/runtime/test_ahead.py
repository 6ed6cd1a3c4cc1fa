"""Items are made ahead, in their order, no more than may be, and errors come in their place."""

from __future__ import annotations

import threading
from time import monotonic

import pytest

from realign.runtime.ahead import Ahead


def build(items, depth):
    """So many are made before they are asked for."""
    return Ahead(items, lambda made: len(made) < depth)


@pytest.mark.parametrize("depth", [1, 5, 100])
def test_every_item_once_in_order(depth):
    ahead = build(iter(range(20)), depth)
    assert list(ahead) == list(range(20))
    assert next(ahead, None) is None
    ahead.close()


def test_it_goes_as_far_ahead_as_it_may_and_no_further():
    made, enough = [], threading.Event()

    def items():
        for number in range(100):
            made.append(number)
            if number == 4:
                enough.set()
            yield number

    ahead = build(items(), 4)
    assert next(ahead) == 0
    assert enough.wait(60)  # without being asked for them
    assert next(ahead) == 1
    ahead.close()
    assert len(made) <= 6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("realign")]


def test_it_goes_on_when_it_is_told_that_it_may():
    made, limits = [], [2]
    ahead = Ahead(map(made.append, range(10)), lambda items: len(made) < limits[0])
    for _ in range(2):
        next(ahead)
    assert not ahead.is_ready()  # not waited for: it may not be made
    limits[0] = 5
    ahead.go_on()
    for _ in range(3):
        next(ahead)
    ahead.close()
    assert made == list(range(5))


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise ValueError("the second is bad")

    ahead = build(items(), 3)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the second is bad"):
        next(ahead)
    assert next(ahead, None) is None
    ahead.close()


def test_a_source_that_waits_is_not_waited_for_longer_than_asked():
    go_on = threading.Event()

    def items():
        yield 1
        go_on.wait(60)
        yield 2

    ahead = build(items(), 3)
    assert next(ahead) == 1
    began = monotonic()
    assert not ahead.is_ready(0.01)
    assert not ahead.is_ready(0.01)
    ahead.close()
    assert monotonic() - began < 30
    go_on.set()
