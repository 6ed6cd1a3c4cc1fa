"""Items are made ahead, in their order, no more than asked for, and errors come in their place."""

from __future__ import annotations

import threading

import pytest

from realign.runtime.ahead import Ahead


@pytest.mark.parametrize("depth", [0, 1, 5, 100])
def test_every_item_once_in_order(depth):
    ahead = Ahead(iter(range(20)), depth)
    assert list(ahead) == list(range(20))
    assert next(ahead, None) is None
    ahead.close()


def test_it_goes_so_far_ahead_and_no_further():
    made, enough = [], threading.Event()

    def items():
        for number in range(100):
            made.append(number)
            if number == 4:
                enough.set()
            yield number

    ahead = Ahead(items(), 4)
    assert made == []
    assert next(ahead) == 0
    assert enough.wait(60)  # without being asked for them
    assert next(ahead) == 1
    ahead.close()
    assert len(made) <= 6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("realign")]


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise ValueError("the second is bad")

    ahead = Ahead(items(), 3)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the second is bad"):
        next(ahead)
    assert next(ahead, None) is None
    ahead.close()
