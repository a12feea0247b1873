"""How long calls take, on a machine that does other things too.

Contenders run in turns, in short segments: what disturbs the machine for a while then disturbs all
of them. Every figure is a median over rounds with its quartiles, so that the noise can be seen.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat

__all__ = ["Timing", "interleave"]

FEWEST_ROUNDS = 3
"""Of a contender that is too slow for the rounds that were asked for."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call: the median over the rounds, and the lower and upper quartile."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """The interquartile range as a fraction of the median."""
        return (self.high - self.low) / self.median

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The summary of one figure per round; at least one."""
        figures = seconds if len(seconds) > 1 else 2 * seconds
        low, middle, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(middle, low, high, len(seconds))


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 25,
    segment: float = 0.02,
    pause: float = 0.0,
    budget: float = 2.0,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Timing]:
    """Time calls in rounds, in each of which every contender has a segment of its own.

    segment   seconds of a segment, about: as many calls as fit, at least one. A call that is not
              timed goes before, because the contender before has emptied the caches
    pause     seconds of sleep before each segment: threads of the contender before may still spin
    budget    seconds for one contender, about: a slow one takes part in fewer rounds, at least 3
    progress  called as `progress(rounds done, rounds in all)`

    In each round the order is another one, the same in every run.
    """
    calls, share = {}, {}
    for name, call in contenders.items():
        call()  # whatever is prepared on the first call
        calls[name], seconds = _calibrate(call, segment)
        wanted = max(FEWEST_ROUNDS, int(budget / seconds))
        share[name] = min(rounds, wanted)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle  # noqa: S311 - the order of segments is no secret
    for done in range(rounds):
        shuffle(order)
        for name in order:
            if done * share[name] // rounds == len(times[name]):
                times[name].append(_segment(contenders[name], calls[name], pause))
        if progress is not None:
            progress(done + 1, rounds)
    return {name: Timing.of(seconds) for name, seconds in times.items()}


def _calibrate(call: Callable[[], object], segment: float) -> tuple[int, float]:
    """How many calls fill a segment, and the seconds that a segment with its extra call takes."""
    calls = 0
    start = time.perf_counter()
    while True:
        call()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= segment:
            return calls, elapsed * (calls + 1) / calls


def _segment(call: Callable[[], object], calls: int, pause: float) -> float:
    if pause:
        time.sleep(pause)
    call()
    start = time.perf_counter()
    for _ in repeat(None, calls):
        call()
    return (time.perf_counter() - start) / calls
