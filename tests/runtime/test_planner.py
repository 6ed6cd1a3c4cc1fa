"""Which work goes together."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from realign.runtime.planner import Bounds, Load, choose_pack

NO_BOUNDS = Bounds(math.inf, math.inf, math.inf)
LOADS = st.lists(
    st.builds(
        lambda order, keys, size, tokens: Load((order,), {key: size + key for key in keys}, tokens),
        st.integers(0, 3),
        st.sets(st.integers(0, 9), max_size=3),
        st.integers(1, 50),
        st.integers(0, 20),
    ),
    min_size=1,
    max_size=12,
)
BOUNDS = st.builds(Bounds, st.integers(0, 200), st.integers(0, 60), st.integers(1, 8))


@given(LOADS, BOUNDS)
def test_a_pack_has_the_longest_waiting_and_keeps_its_bounds(loads, bounds):
    pack = choose_pack(loads, bounds)
    assert pack.rows[0] == 0
    assert pack.rows == sorted(set(pack.rows))
    assert pack.tokens == sum(loads[row].tokens for row in pack.rows)
    assert pack.bytes == sum(pack.shares.values())
    assert pack.is_full == (len(pack.rows) < len(loads))
    if len(pack.rows) > 1:
        assert pack.bytes <= bounds.bytes
        assert pack.tokens <= bounds.tokens
        assert len(pack.rows) <= bounds.count


@given(LOADS)
def test_without_bounds_all_go_together(loads):
    pack = choose_pack(loads, NO_BOUNDS)
    assert pack.rows == list(range(len(loads)))
    assert pack.shares.keys() == {key for load in loads for key in load.shares}


def test_what_is_shared_counts_once():
    loads = [Load((), {"prompt": 90, number: 10}) for number in range(8)]
    assert choose_pack(loads, Bounds(120, math.inf, math.inf)).rows == [0, 1, 2]


def test_like_goes_with_like():
    loads = [Load((size,), {number: 1}) for number, size in enumerate([5, 1, 5, 1, 9, 5])]
    assert choose_pack(loads, Bounds(math.inf, math.inf, 3)).rows == [0, 2, 5]
    assert choose_pack(loads[1:], Bounds(math.inf, math.inf, 2)).rows == [0, 2]
    assert choose_pack(loads[4:], Bounds(math.inf, math.inf, 2)).rows == [0, 1]


def test_what_does_not_fit_leaves_room_for_what_does():
    loads = [Load((number,), {number: size}) for number, size in enumerate([5, 50, 4])]
    assert choose_pack(loads, Bounds(10, math.inf, math.inf)).rows == [0, 2]
