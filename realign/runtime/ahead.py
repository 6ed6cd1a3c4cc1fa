"""What is needed soon, made ready in a thread while the device works."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from time import monotonic
from typing import Generic, TypeVar

Item = TypeVar("Item")

# Seconds that `close` waits for the item that is being made: what makes it may wait for something itself.
CLOSE_SECONDS = 1.0


class Ahead(Generic[Item]):
    """An iterator over `items` that goes through them in a thread of its own, as far ahead as it may.

    An error on the way is raised in its place.

    Args:
        may_go_on: whether one more item may be made, given those that are made and not taken yet; in either
            thread. It must allow an item that is waited for.
    """

    def __init__(self, items: Iterable[Item], may_go_on: Callable[[Collection[Item]], bool]) -> None:
        self._items, self._may_go_on = iter(items), may_go_on
        self._made: deque[Item] = deque()
        self._error: BaseException | None = None
        self._is_making = self._has_ended = self._is_closed = False
        self._began = 0.0
        self._changed = threading.Condition()
        # A daemon: a source that never gives its next item keeps no program from ending.
        self._thread = threading.Thread(target=self._make_all, name="realign-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._changed:
            self.is_ready()
            if self._made:
                item = self._made.popleft()
                self._changed.notify_all()
                return item
            assert self._has_ended, "waited for an item that may not be made"
            error, self._error = self._error, None
            raise StopIteration if error is None else error

    def is_ready(self, patience: float = math.inf) -> bool:
        """Whether the next item, the end or an error is there, `patience` seconds after it was begun."""
        with self._changed:
            if not self._has_next() and self._begin():
                self._changed.notify_all()
                left = self._began + patience - monotonic()
                self._changed.wait_for(self._has_next, min(max(left, 0.0), threading.TIMEOUT_MAX))
            return self._has_next()

    def go_on(self) -> None:
        """To be called where `may_go_on` may have changed."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Make no more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)

    def _has_next(self) -> bool:
        return bool(self._made) or self._has_ended

    def _begin(self) -> bool:
        """Whether an item is being made; begun now, if it may be."""
        if not self._is_making and self._may_go_on(self._made):
            self._is_making, self._began = True, monotonic()
        return self._is_making

    def _make_all(self) -> None:
        """What the thread does; it holds no item itself."""
        try:
            while self._wait_for_leave():
                self._put(next(self._items))
        except StopIteration:
            pass
        except BaseException as error:  # noqa: BLE001 raised where the item is taken
            self._error = error
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _wait_for_leave(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._begin())
            return not self._is_closed

    def _put(self, item: Item) -> None:
        with self._changed:
            self._made.append(item)
            self._is_making = False
            self._changed.notify_all()
