"""Problem after problem within the minutes allowed, with what is measured so far in the result file after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from bench import environment

Problem = TypeVar("Problem")
Keep = Callable[[dict[str, Any]], Any]  # writes a result


class Progress:
    """A result that grows.

    A program that is stopped at a time limit, or whose GPU fails, loses the problem that it was at, and nothing before
    it: the file names that one, and those after it, under "missing".

    Args:
        result: with all that is known beforehand; `rows` is the list that the program appends to.
        keep: writes it.
        minutes: no problem is begun when less is left than the last one took.
    """

    def __init__(self, result: dict[str, Any], keep: Keep, minutes: float) -> None:
        self.result, self._keep, self._minutes = result, keep, minutes
        self._started, self._last, self._stopped = time.monotonic(), 0.0, ""
        self._skipped: list[dict[str, Any]] = []

    def stop(self, reason: str) -> None:
        """Nothing after the present problem is measured, for that reason."""
        self._stopped = reason

    def each(self, problems: Iterable[tuple[dict[str, Any], Problem]]) -> Iterator[Problem]:
        """The problems, each given with what names it under "missing"; after each one's turn the result is written."""
        todo = list(problems)
        self._write([name for name, _ in todo])
        for i, (name, problem) in enumerate(todo):
            used_up = 60 * self._minutes - (time.monotonic() - self._started) < self._last
            if self._stopped or used_up:
                self._skipped.append(name | {"reason": self._stopped or f"{self._minutes:g} minutes were used up"})
                continue
            begun = time.monotonic()
            yield problem
            self._last = time.monotonic() - begun
            self._write([name for name, _ in todo[i + 1 :]])

    def done(self) -> dict[str, Any]:
        """The result, complete, and written."""
        self.result["environment"]["clocks_after"] = environment.clocks()
        self._write([])
        return self.result

    def _write(self, ahead: list[dict[str, Any]]) -> None:
        not_reached = [name | {"reason": "not reached"} for name in ahead]
        self.result["missing"] = [*self._skipped, *not_reached]
        self.result["seconds"] = round(time.monotonic() - self._started, 1)
        self._keep(self.result)
