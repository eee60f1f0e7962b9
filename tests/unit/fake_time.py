"""Time that stands still until told, an event loop that lives in it, and gates to hold work up."""

import asyncio
import math
import selectors
from typing import Any

from controlplane.clock import NS_PER_MS, NS_PER_S


class FakeClock:
    """Has the interface of `controlplane.clock.Clock`; stands still until told."""

    def __init__(self) -> None:
        self.now = 5_000_000_000
        self.offset = 1_760_000_000_123_456_789

    def advance(self, ms: float) -> None:
        self.now += int(ms * NS_PER_MS)

    def now_ns(self) -> int:
        return self.now

    def to_unix_ns(self, monotonic_ns: int) -> int:
        return monotonic_ns + self.offset

    def from_unix_ns(self, unix_ns: int) -> int:
        return unix_ns - self.offset


class Deadlock(Exception):
    """Everything waits for something that nobody will do."""


class _Selector(selectors.DefaultSelector):
    loop: "FakeTimeLoop"

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and not self.loop.frozen and (timeout is None or timeout > 0):
            if timeout is None:
                raise Deadlock
            self.loop.clock.now += max(1, math.ceil(timeout * NS_PER_S))
        return ready


class FakeTimeLoop(asyncio.SelectorEventLoop):
    """An event loop for work without threads. Its time is a clock's."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.frozen = False
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.clock.now / NS_PER_S

    def settle(self) -> None:
        """Run until everything waits, without letting time pass."""
        self.frozen = True
        try:
            while True:
                self.call_soon(self.stop)
                self.run_forever()
                if not self._ready:  # type: ignore[attr-defined]
                    return
        finally:
            self.frozen = False


class Gate:
    """Where work waits for a test to let it go on, while it is shut."""

    def __init__(self) -> None:
        self.shut = False
        self.waiting: list[tuple[object, asyncio.Future[Any]]] = []  # what for, and its turn

    async def pass_through(self, what: object = None) -> Any:
        """Return what the test says (None if the gate is open), or raise it."""
        if not self.shut:
            await asyncio.sleep(0)  # others get their turn here
            return None
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append((what, turn))
        try:
            return await turn
        finally:
            self.waiting = [one for one in self.waiting if one[1] is not turn]

    def let(self, outcome: object = None, which: int = 0) -> None:
        """Let one go on: with this outcome, which is raised if it is an exception."""
        turn = self.waiting.pop(which)[1]
        if turn.done():  # given up
            return
        if isinstance(outcome, BaseException):
            turn.set_exception(outcome)
        else:
            turn.set_result(outcome)

    def open(self) -> None:
        self.shut = False
        while self.waiting:
            self.let()
