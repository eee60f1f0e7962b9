"""Time: monotonic nanoseconds inside, RFC 3339 UTC at the edges."""

import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", re.ASCII)


def rfc3339(unix_ns: int) -> str:
    """Format Unix time in ns as RFC 3339 with nanoseconds."""
    seconds, fraction_ns = divmod(unix_ns, NS_PER_S)
    return f"{_stamp(seconds)}.{fraction_ns:09d}Z"


def parse_rfc3339(text: str) -> int:
    """Return Unix time in ns. ValueError if `text` is not RFC 3339 in UTC."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an RFC 3339 time in UTC")
    return _seconds(match[1]) * NS_PER_S + int((match[2] or "0").ljust(9, "0"))


# Many instants are within the same few seconds.


@lru_cache(maxsize=4_096)
def _stamp(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@lru_cache(maxsize=4_096)
def _seconds(stamp: str) -> int:
    return int(datetime.fromisoformat(stamp + "+00:00").timestamp())


@dataclass(frozen=True, slots=True)
class Clock:
    """The machine's monotonic clock and its distance from UTC, fixed when the process starts.

    A later step of the wall clock moves no deadline of this process.
    """

    unix_offset_ns: int = field(default_factory=lambda: time.time_ns() - time.monotonic_ns())

    def now_ns(self) -> int:
        """Return CLOCK_MONOTONIC."""
        return time.monotonic_ns()

    def to_unix_ns(self, monotonic_ns: int) -> int:
        """Return the Unix time of a monotonic instant."""
        return monotonic_ns + self.unix_offset_ns

    def from_unix_ns(self, unix_ns: int) -> int:
        """Return the monotonic instant of a Unix time."""
        return unix_ns - self.unix_offset_ns
