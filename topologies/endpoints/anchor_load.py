"""What an anchor knows of itself: how much it does at a time, and how soon answers begin."""

SLOWNESS_WEIGHT = 0.2  # of the newest measurement in the average
MEMORY_NS = 10_000_000_000  # an average of requests longer ago says nothing of now
NS_PER_MS = 1_000_000


class Load:
    """Completions under way. Instants are CLOCK_MONOTONIC ns and are passed in."""

    def __init__(self, slots: int) -> None:
        """`slots`: completions at a time."""
        self.slots = slots
        self.used = 0
        self.taken = 0  # ever
        self._latency_ns: float | None = None
        self._measured_ns = 0  # when that was measured last

    @property
    def free(self) -> bool:
        """Whether one more completion would be taken."""
        return self.used < self.slots

    @property
    def fraction(self) -> float:
        """Of the slots, how many are in use: 0 to 1."""
        return self.used / self.slots if self.slots else 1.0

    def take(self) -> int:
        """Occupy a slot and number the completion."""
        self.used += 1
        self.taken += 1
        return self.taken

    def give_back(self) -> None:
        """Free a slot."""
        self.used -= 1

    def answered(self, asked_ns: int, now_ns: int) -> None:
        """Take it that a request of `asked_ns` gets its first token now."""
        took_ns = now_ns - asked_ns
        if self._latency_ns is None or now_ns - self._measured_ns > MEMORY_NS:
            self._latency_ns = took_ns
        else:
            self._latency_ns += SLOWNESS_WEIGHT * (took_ns - self._latency_ns)
        self._measured_ns = now_ns

    def latency_ms(self, now_ns: int) -> float | None:
        """Return the moving average of request to first token; None: none was asked for lately."""
        if self._latency_ns is None or now_ns - self._measured_ns > MEMORY_NS:
            return None
        return self._latency_ns / NS_PER_MS
