"""A progress bar: tqdm's where it is installed, a plain one otherwise."""

import sys
import time
from collections.abc import Iterator


class _PlainBar:
    """The two methods of tqdm that the examples use, on one line of stderr."""

    def __init__(self, total: int, desc: str):
        self._total, self._desc, self._note = total, desc, ""
        self._start = time.perf_counter()

    def __iter__(self) -> Iterator[int]:
        shown = 0.0
        for step in range(self._total):
            yield step
            now = time.perf_counter()
            if now - shown > 0.2 or step + 1 == self._total:
                shown = now
                done = (step + 1) / self._total
                left = (now - self._start) * (1 - done) / done
                bar = "#" * round(20 * done)
                line = f"{self._desc}: {done:4.0%} |{bar:<20}| {step + 1}/{self._total}, {left:.0f} s left {self._note}"
                print("\r" + line, end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)

    def set_postfix_str(self, note: str) -> None:
        self._note = note


def progress(total: int, desc: str):
    """Iterate over `range(total)` behind a bar; `.set_postfix_str(text)` of the result adds a note to it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _PlainBar(total, desc)
    return tqdm(range(total), desc=desc, ncols=100, mininterval=0.2)
