"""One transaction at a time per name (a UE, an idempotency key); others wait their turn."""

import asyncio
from collections import deque
from collections.abc import Iterable
from types import TracebackType


class Locks:
    """Locks by name, which exist only while somebody holds or wants them.

    For one event loop. Waiting is first come, first served.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}

    def held(self, name: str) -> bool:
        """Whether somebody holds it."""
        return name in self._queues

    def hold(self, *names: str) -> "Held":
        """Hold all of these: `async with locks.hold(...)`."""
        return Held(self, names if len(names) == 1 else sorted(set(names)))

    async def acquire(self, name: str) -> None:
        """Hold one."""
        queue = self._queues.get(name)
        if queue is None:
            self._queues[name] = deque()
            return
        turn = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(name)  # it was our turn already
            raise

    def release(self, name: str) -> None:
        """Let the next one hold it."""
        queue = self._queues[name]
        while queue:
            turn = queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._queues[name]


class Held:
    """A context in which locks are held; they are taken in order, so that nobody deadlocks."""

    def __init__(self, locks: Locks, names: Iterable[str]) -> None:
        self._locks = locks
        self._names = names
        self._held: list[str] = []

    async def __aenter__(self) -> None:
        try:
            for name in self._names:
                await self._locks.acquire(name)
                self._held.append(name)
        except BaseException:
            self._let_go()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._let_go()

    def _let_go(self) -> None:
        for name in self._held:
            self._locks.release(name)
