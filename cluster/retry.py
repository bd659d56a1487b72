"""Making a request again when a service could not answer it for now.

Pure rules; knows nothing about gRPC.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict

from cluster.errors import ServiceError
from homer.errors import ConfigError

# The name of the trailing metadata with the seconds after which to ask again.
RETRY_AFTER = "retry-after"
# The same for gRPC's own retries, in milliseconds.
RETRY_PUSHBACK = "grpc-retry-pushback-ms"
# Codes that say: not now. Everything else would go wrong in the same way again.
PASSING_CODES = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 10.0
# Clients that failed together should not come back together.
JITTER = 0.25


def retry_entries(seconds: float) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that says when to ask again."""
    return ((RETRY_AFTER, f"{seconds:.1f}"), (RETRY_PUSHBACK, str(round(1000 * seconds))))


def delay_seconds(error: ServiceError, failures: int) -> float | None:
    """How long to wait after so many failures, the last being `error`; None: do not try again.

    What the service asks for counts; without that the time doubles from one failure to the next.
    """
    if error.code not in PASSING_CODES:
        return None
    delay = error.retry_after_seconds
    if delay is None:
        delay = min(FIRST_DELAY_SECONDS * 2 ** min(failures - 1, 16), LONGEST_DELAY_SECONDS)
    return delay * (1 + JITTER * random.random())


class Attempts:
    """The attempts at one request: when there is another, and which of its tokens are new.

    Parameters
    ----------
    retries : int
        How many there may be after the first.
    timeout_seconds : float, optional
        For all of them together.
    """

    def __init__(self, retries: int, timeout_seconds: float | None) -> None:
        self._retries = retries
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._replay = Replay()
        self._failures = 0

    def begin(self) -> float | None:
        """A new attempt; the seconds that it may take."""
        self._replay.begin()
        return None if self._deadline is None else self._deadline - time.monotonic()

    def is_new(self, token_id: int, answer: int) -> bool:
        """As `Replay.is_new`."""
        return self._replay.is_new(token_id, answer)

    def delay_after(self, error: ServiceError) -> float:
        """How long to wait before the next attempt; raises `error` where there is none."""
        self._failures += 1
        delay = delay_seconds(error, self._failures)
        if delay is None or self._failures > self._retries:
            raise error
        if self._deadline is not None and time.monotonic() + delay >= self._deadline:
            raise error
        return delay


def check_retries(retries: int) -> int:
    """`retries`, which may not be negative.

    Raises
    ------
    ConfigError
    """
    if retries < 0:
        raise ConfigError(f"retries is {retries}; use 0 or more")
    return retries


class Replay:
    """The tokens of answers over several attempts: none is given to the caller twice.

    It needs answers that are the same each time: greedy, or with a seed.
    """

    def __init__(self) -> None:
        self._given: defaultdict[int, list[int]] = defaultdict(list)
        self._positions: Counter[int] = Counter()

    def begin(self) -> None:
        """A new attempt: its tokens come from the first one on."""
        self._positions.clear()

    def is_new(self, token_id: int, answer: int = 0) -> bool:
        """Whether the caller does not have the next token of an answer, `token_id`, already.

        Raises
        ------
        ServiceError
            When the answer is another one than before.
        """
        position, given = self._positions[answer], self._given[answer]
        self._positions[answer] += 1
        if position == len(given):
            given.append(token_id)
            return True
        if given[position] != token_id:
            raise ServiceError(
                "DATA_LOSS",
                f"the request was made again, and token {position} of its answer came out another "
                "than the one that was given before; ask anew, and discard this answer",
            )
        return False
