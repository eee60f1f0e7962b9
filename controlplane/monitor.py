"""Failure detection: who has been silent for longer than the budget, by a watcher that may stall.

A member is monitored from its first sign of life on. It shall give one every quarter of the budget;
silence for longer than three quarters of it is failure.

A watcher that stalls must not blame the members, whose signs it could not read, and which may have
stalled with it. Therefore:

- a check judges by what was known at the check before: the signs given until then have been read by
  now, so whoever was overdue then, and has still not been heard, is silent indeed;
- a check that comes late puts every deadline off by its lateness, though never past a whole silence
  from now: silence counts only while the watcher keeps time.

Hence a member whose signs are never so far apart is never found, however long and often the
watcher alone stalls; nor is one that gives a sign every quarter of the budget, if both stall
together, and not more than three times within one budget. One that dies is found within the budget
and the time that the watcher was late: silence is failure two intervals between checks (an eighth
of the budget each) before the budget is used up. All this holds only if one event loop calls
`check` and reads the signs of life.
"""

from dataclasses import dataclass

SIGNS_PER_BUDGET = 4
CHECKS_PER_BUDGET = 8


@dataclass(slots=True)
class _Watch:
    heard_ns: int
    deadline_ns: int


class Monitor:
    """Deadlines by name. Instants are CLOCK_MONOTONIC ns and are passed in."""

    def __init__(self, budget_ns: int) -> None:
        self.budget_ns = budget_ns
        self.next_check_ns: int | None = None  # None: nobody is monitored
        self._interval_ns = budget_ns // CHECKS_PER_BUDGET
        # A check finds it, and the next one says so, within the budget.
        self._silence_ns = budget_ns - 2 * self._interval_ns
        self._checked_ns = 0
        self._watches: dict[str, _Watch] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._watches

    def heard(self, name: str, now_ns: int) -> None:
        """Take a sign of life, read at `now_ns`."""
        self._watches[name] = _Watch(now_ns, now_ns + self._silence_ns)
        if self.next_check_ns is None:
            self.next_check_ns = now_ns + self._interval_ns

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
        before_ns, self._checked_ns = self._checked_ns, now_ns
        self.next_check_ns = now_ns + self._interval_ns if self._watches else None
        silent = {
            name: now_ns - watch.heard_ns
            for name, watch in self._watches.items()
            if watch.deadline_ns <= before_ns
        }
        for watch in self._watches.values():
            put_off_ns = watch.deadline_ns + now_ns - due_ns
            watch.deadline_ns = min(put_off_ns, now_ns + self._silence_ns)
        return silent
