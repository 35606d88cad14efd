"""How fast a counter grows, over the last seconds."""

from __future__ import annotations

from bisect import bisect_right

WINDOW_SECONDS = 10.0
_SPACING_SECONDS = 0.25


class Rate:
    """Follows a counter. One thread notes, any may read: what is read is replaced as a whole."""

    def __init__(self) -> None:
        self._samples: tuple[tuple[float, int], ...] = ((float("-inf"), 0),)
        self._latest = 0

    def note(self, now: float, total: int) -> None:
        """Note that the counter is ``total`` at ``now``, in seconds that never go back."""
        self._latest = total
        if now - self._samples[-1][0] >= _SPACING_SECONDS:
            start = self._index(now - WINDOW_SECONDS)
            self._samples = (*self._samples[start:], (now, total))

    def per_second(self, now: float) -> float:
        """Return the mean growth since the last note that is not younger than the window."""
        time, total = self._samples[self._index(now - WINDOW_SECONDS)]
        # before the first note, nothing grew for ever
        return (self._latest - total) / min(now - time, WINDOW_SECONDS)

    def _index(self, time: float) -> int:
        """Return which sample was the latest at ``time``."""
        return bisect_right(self._samples, (time, float("inf"))) - 1
