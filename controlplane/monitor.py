"""Failure detection: who has been silent for longer than the budget, by a watcher that may stall.

A member is monitored from its first sign of life on. It shall give one every quarter of the budget;
silence for longer than the budget is failure.

A watcher that stalls must not blame the members, whose signs it could not read meanwhile. So
`check` measures how late it was called itself. Beyond `TOLERANCE` of its interval,

- every deadline is put off by the lateness, though never past a whole budget from now;
- that check finds nobody, unless the one before was late too: what has arrived is read first.

Hence a member that dies is found within the budget, one interval and the tolerance, plus the time
that the watcher itself stalled and one interval more. Stalls without end cannot put that off for
ever. All this holds only if one event loop calls `check` and reads the signs of life.
"""

from dataclasses import dataclass

CHECKS_PER_BUDGET = 4
TOLERANCE = 0.5  # of the interval between checks


@dataclass(slots=True)
class _Watch:
    heard_ns: int
    deadline_ns: int


class Monitor:
    """Deadlines by name. Instants are CLOCK_MONOTONIC ns and are passed in."""

    def __init__(self, budget_ns: int) -> None:
        self.budget_ns = budget_ns
        self.interval_ns = budget_ns // CHECKS_PER_BUDGET  # between checks, and between signs
        self.next_check_ns: int | None = None  # None: nobody is monitored
        self._watches: dict[str, _Watch] = {}
        self._was_late = False  # the last check

    def __contains__(self, name: str) -> bool:
        return name in self._watches

    def heard(self, name: str, now_ns: int) -> None:
        """Take a sign of life, read at `now_ns`."""
        self._watches[name] = _Watch(now_ns, now_ns + self.budget_ns)
        if self.next_check_ns is None:
            self.next_check_ns = now_ns + self.interval_ns

    def heard_ns(self, name: str) -> int | None:
        """Return when a member was heard last; None if it never was."""
        watch = self._watches.get(name)
        return None if watch is None else watch.heard_ns

    def doubt(self, name: str, now_ns: int) -> None:
        """Give a monitored member only half a budget from now to be heard."""
        watch = self._watches[name]
        watch.deadline_ns = min(watch.deadline_ns, now_ns + self.budget_ns // 2)

    def forget(self, name: str) -> None:
        """Monitor a member no more."""
        self._watches.pop(name, None)

    def check(self, now_ns: int) -> dict[str, int]:
        """Return who has been silent too long, and for how many ns; again each time until heard.

        To be called at `next_check_ns`; before that it does nothing.
        """
        due_ns = self.next_check_ns
        if due_ns is None or now_ns < due_ns:
            return {}
        self.next_check_ns = now_ns + self.interval_ns if self._watches else None
        late_ns = now_ns - due_ns
        was_late, self._was_late = self._was_late, late_ns > self.interval_ns * TOLERANCE
        if self._was_late:
            for watch in self._watches.values():
                watch.deadline_ns = min(watch.deadline_ns + late_ns, now_ns + self.budget_ns)
            if not was_late:
                return {}
        return {
            name: now_ns - watch.heard_ns
            for name, watch in self._watches.items()
            if watch.deadline_ns <= now_ns
        }
