"""Trying again what may pass: throttling, time-outs, resets, a server's trouble, half an answer."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

GIVE_UP_AFTER = 180.0
"""Seconds from the first try: as long as a store may be away."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0


class Transient(Exception):
    """Raised by an attempt that is worth another; `__cause__` is what came."""


class GaveUp(OSError):
    """It did not pass in time. Says how often it was tried, for how long, and what came last."""


def retried(
    attempt: Callable[[], T],
    what: str,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """The result of `attempt`, tried again after each Transient: pauses are drawn from 0 to a doubling limit.

    Full jitter, so that a thousand readers that were throttled together do not come back together. Raises GaveUp, an
    OSError, and whatever else `attempt` raises at once.
    """
    began, tries, limit = clock(), 0, FIRST_PAUSE
    while True:
        tries += 1
        try:
            return attempt()
        except Transient as error:
            pause = random.uniform(0, limit)
            spent = clock() - began
            if spent + pause > GIVE_UP_AFTER:
                cause = error.__cause__ or error
                reason = " ".join(str(cause).split()) or type(cause).__name__
                raise GaveUp(f"{what}: failed {tries} times in {spent:.0f} s, last: {reason}") from cause
        sleep(pause)
        limit = min(2 * limit, LONGEST_PAUSE)
