"""What is needed soon, made ready in a thread while the device works."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

_END: Any = object()


class Ahead(Generic[Item]):
    """An iterator over `items` that goes through them in a thread of its own, up to `depth` items ahead.

    It goes ahead from one call for an item to the next. An error on the way is raised in its place.
    """

    def __init__(self, items: Iterable[Item], depth: int) -> None:
        self._items, self._depth = iter(items), depth
        self._coming: deque[Future[Item]] = deque()
        self._thread = ThreadPoolExecutor(1, "realign-ahead")

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        while len(self._coming) <= self._depth:
            self._coming.append(self._thread.submit(next, self._items, _END))
        item = self._coming.popleft().result()
        if item is _END:
            raise StopIteration
        return item

    def close(self) -> None:
        """Make no more; waits for the item that is being made."""
        self._thread.shutdown(cancel_futures=True)
        self._coming.clear()
