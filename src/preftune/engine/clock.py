"""Where the time of a step goes: seconds per named phase, by laps."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """A lap counter: `lap(name)` books the seconds since the previous lap under `name`.

    On an accelerator the host runs ahead of the device, so a phase that waits for results carries the
    device's time; the sum over a step is right either way.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def read(self) -> tuple[float, dict[str, float]]:
        """Total seconds and the share of each phase since the last reading; starts over."""
        total = sum(self._seconds.values())
        shares = {name: seconds / total for name, seconds in self._seconds.items()} if total > 0 else {}
        self._seconds = {}
        return total, shares
