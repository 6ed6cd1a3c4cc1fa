"""What is to be reached, and whether it is, as the rows of one run say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.generate.rows import ENGINE, GenerateRow

Rows = dict[tuple[str, str], GenerateRow]


@dataclass(frozen=True)
class Target:
    """A bound on a figure of the engine's rows.

    Attributes:
        what: the figure, for people.
        workload, variants: the row, of the first variant that was measured.
        figure: the measured number; gets the row and all others of its model.
        bound: what it must reach, or with `is_most` what it may be at most.
    """

    what: str
    workload: str
    variants: tuple[str, ...]
    figure: Callable[[GenerateRow, Rows], float]
    bound: float
    is_most: bool = False


@dataclass(frozen=True)
class Result:
    """A target and what was measured; None where nothing was."""

    target: Target
    measured: float | None

    @property
    def is_met(self) -> bool | None:
        """None where nothing was measured."""
        if self.measured is None:
            return None
        bound = self.target.bound
        return self.measured <= bound if self.target.is_most else self.measured >= bound


def _field(name: str) -> Callable[[GenerateRow, Rows], float]:
    return lambda row, rows: getattr(row, name)


def _over_unshared(row: GenerateRow, rows: Rows) -> float:
    """How many times faster than the same where nothing is shared."""
    return rows["W3", "unguided, nothing shared"].seconds / row.seconds


def _seconds_an_image(row: GenerateRow, rows: Rows) -> float:
    return row.seconds / row.images


FASTER, RATE = _field("times_faster"), _field("images_per_s")

TEXT, PICTURES = _field("text_times_faster"), _field("picture_times_faster")
GENEVAL = ("553 prompts of GenEval", "553 prompts of world")

CPU_TARGETS = (
    Target("W3 unguided, times the baseline", "W3", ("unguided",), FASTER, 4),
    Target("W3 guided, times the baseline", "W3", ("guided",), FASTER, 4),
    Target("W4 unguided, text, times the baseline", "W4", ("unguided",), TEXT, 8),
    Target("W4 unguided, pictures, times the baseline", "W4", ("unguided",), PICTURES, 3),
    Target("W4 guided, text, times the baseline", "W4", ("guided",), TEXT, 8),
    Target("W4 guided, pictures, times the baseline", "W4", ("guided",), PICTURES, 3),
    Target("realign generate of 553 prompts, times the baseline", "geneval", GENEVAL, FASTER, 3),
)

GPU_TARGETS = (
    Target("W1, seconds an image", "W1", ("batch 1",), _seconds_an_image, 8.0, is_most=True),
    *(
        Target(f"W2 batch {n}, share of the matrix rate", "W2", (f"batch {n}",), _field("matrix_share"), 0.7)
        for n in (8, 16, 32, 64)
    ),
    Target("W3 unguided, images a second", "W3", ("unguided",), RATE, 2.2),
    Target("W3 unguided, times its unshared form", "W3", ("unguided",), _over_unshared, 2),
    Target("W3t unguided, images a second", "W3t", ("unguided",), RATE, 3.0),
    Target("W3t guided on every step, images a second", "W3t", ("guided on every step",), RATE, 1.5),
    Target("W4 unguided, text, times the baseline", "W4", ("unguided",), TEXT, 10),
)


def judge(targets: Sequence[Target], rows: Iterable[GenerateRow]) -> list[Result]:
    """The figure of every target, from rows of one model on one machine."""
    found: Rows = {(row.workload, row.variant): row for row in rows if row.impl == ENGINE}
    results = []
    for target in targets:
        places = [(target.workload, variant) for variant in target.variants]
        row = next((found[place] for place in places if place in found), None)
        try:
            results.append(Result(target, None if row is None else target.figure(row, found)))
        except KeyError:  # of a ratio of two rows the other was not measured
            results.append(Result(target, None))
    return results


def describe(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """Lines of a table: what, measured, needed, and met, missed or not measured."""
    words = {True: "met", False: "missed", None: "not measured"}
    return [
        (
            result.target.what,
            "" if result.measured is None else f"{result.measured:.3g}",
            f"{'at most' if result.target.is_most else 'at least'} {result.target.bound:g}",
            words[result.is_met],
        )
        for result in results
    ]
