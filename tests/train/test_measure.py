"""What the log says of an iteration's chains, over processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from realign.runtime.request import Reasoning
from train.measure import measure_chains
from train.ranks import Ranks

OWN = ((0, "a", None), (0, "a", None), (1, "a", "torn"))
OTHERS = ((1, "a", None), (1, "b", "torn"))


def build_rollouts(*chains: tuple[int, str | None, str | None]) -> list:
    """As much of rollouts as is looked at: their groups, texts and what is wrong with these."""
    found = []
    for group, text, error in chains:
        reasoning = None if text is None else Reasoning("ic-cot", text, error=error)
        found.append(SimpleNamespace(group=group, sample=SimpleNamespace(reasoning=reasoning)))
    return found


class Two(Ranks):
    """The first of two processes; the second has `OTHERS`."""

    def gather_list(self, items: list) -> list:
        return [*items, *((group, text, error is not None) for group, text, error in OTHERS)]


CASES = [pytest.param((*OWN, *OTHERS), Ranks(), id="one"), pytest.param(OWN, Two(0, 2), id="two")]


@pytest.mark.parametrize(("chains", "ranks"), CASES)
def test_chains_are_distinct_in_their_group_though_it_spans_processes(chains: tuple, ranks: Ranks) -> None:
    """Three of five: a, and a and b."""
    assert measure_chains(build_rollouts(*chains), ranks) == {"distinct_chains": 0.6, "failures": 0.4}


def test_nothing_is_said_of_chains_where_there_are_none() -> None:
    assert measure_chains(build_rollouts((0, None, None)), Ranks()) == {}
