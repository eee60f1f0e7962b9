"""Where the time of a page goes: its steps, timed one by one while pages run.

A step is a function that never waits. What is timed is the CPU time of the event loop's thread, so
that other processes do not count; of a write, the time until it is durable. To time a step costs
some 1 µs, which is why this is a run of its own.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from controlplane import service
from controlplane.answers import Grant
from controlplane.controller import Controller
from controlplane.entries import Chain
from controlplane.ledger import Ledger
from controlplane.northbound import documents
from controlplane.northbound.sessions import SessionRequest
from controlplane.paging import Pager
from controlplane.sqlite_store import SqliteStore
from upf.gate import Gate

WRITE = "write_and_sync"
STEPS: tuple[tuple[str, type[Any], str], ...] = (
    ("resolve", Pager, "resolve"),
    *(("lease", Controller, name) for name in ("terms", "reserve", "prepare", "commit")),
    ("encode", Chain, "lines"),
    ("fold", Ledger, "fold"),
    ("kernel", Gate, "apply"),
    ("token", service._Issuer, "issue"),
    (WRITE, SqliteStore, "write"),  # in the writer's thread
)


class Parts:
    """Sums of time, ns, by step."""

    def __init__(self) -> None:
        self.ns: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the steps of whatever runs meanwhile."""
        patches = [
            patch.object(owner, name, self.timed(step, getattr(owner, name)))
            for step, owner, name in STEPS
        ]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is timed."""
        sums = self.ns
        now_ns = time.perf_counter_ns if step == WRITE else time.thread_time_ns

        def timed(*args: Any, **named: Any) -> Any:
            started_ns = now_ns()
            try:
                return function(*args, **named)
            finally:
                sums[step] += now_ns() - started_ns

        return timed

    def parse(self, ue: str, intent: dict[str, Any]) -> SessionRequest:
        """Read a request as the API does."""
        body = json.dumps({"ue": ue, "intent": intent}).encode()
        parsed: SessionRequest = self.timed("parse", SessionRequest.model_validate_json)(body)
        return parsed

    def answer(self, controller: Controller, grant: Grant) -> None:
        """Write an answer as the API does."""
        self.timed("response", lambda: documents.Json(documents.grant(controller, grant)))()
