"""Calls made ahead of time, so that data is ready when the loop asks for it."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

MAX_WAITING = 64  # results; the oldest is dropped when nobody has come for it by then


class Prefetcher:
    """Runs calls ahead of time on one background thread. A key tells calls apart."""

    def __init__(self):
        self._thread: ThreadPoolExecutor | None = None
        self._begun: dict[Hashable, Future] = {}

    def begin(self, key: Hashable, function: Callable, *arguments) -> None:
        """Begins a call, unless one with this key has begun."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1)
        while len(self._begun) >= MAX_WAITING:
            self._begun.pop(next(iter(self._begun))).cancel()
        if key not in self._begun:
            self._begun[key] = self._thread.submit(function, *arguments)

    def take(self, key: Hashable, function: Callable, *arguments) -> Any:
        """Returns the result of the call with this key, and makes the call now if it has not begun."""
        begun = self._begun.pop(key, None)
        return function(*arguments) if begun is None else begun.result()
