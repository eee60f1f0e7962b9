"""What HTTP requests tell of switches: which anchor answered each, and which failed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from scripts.bench.switching.datagrams import SENDER_CPU
from scripts.bench.switching.methods import Method
from scripts.bench.switching.sample import Sample, samples
from scripts.errors import UserError
from scripts.interruption import Trace, build_trace

INTERVAL_MS = 10
INTERVAL_NS = INTERVAL_MS * 1_000_000
BEGIN_S, END_S = 0.15, 0.15
BETWEEN_S = (0.25, 0.4)
END_TIMEOUT_S = 30
BEFORE_NS = 100_000_000
"""A request that was under way when the command was begun is of that switch."""
FOREVER_MS = 3_600_000


@contextmanager
def servers(methods: Sequence[Method]) -> Iterator[None]:
    """Run the HTTP servers of all anchors of these methods' networks."""
    namespaces = [anchor.path for method in methods for anchor in method.network.anchors]
    with _program("http_server", namespaces):
        yield


def visit(method: Method, first: int, count: int, order: random.Random) -> list[Sample]:
    """Switch `count` times under requests, to `first` at first; return what each came to."""
    asked = {
        "netns": method.network.ue.path,
        "url": method.url,
        "interval_ms": INTERVAL_MS,
        "resolver": method.resolver,
        "cpu": SENDER_CPU,
    }
    switches = []
    with _program("http_client", [json.dumps(asked)]) as client:
        time.sleep(BEGIN_S)
        for number in range(count):
            time.sleep(order.uniform(*BETWEEN_S) + (method.settling_s if number else 0))
            switches.append(method.switch((first + number) % 2))
        time.sleep(END_S + method.settling_s)
        end_ns = time.time_ns()
        output, _ = client.communicate(timeout=END_TIMEOUT_S)
        if client.returncode:
            raise UserError(f"{method.name}: the HTTP client failed")
    trace = _trace(json.loads(output))
    if trace.lost.all():
        raise UserError(f"{method.name}: not one request was answered")
    return samples(
        trace,
        switches,
        before_ns=BEFORE_NS,
        end_ns=end_ns,
        interval_ns=INTERVAL_NS,
        sites=[(first + number) % 2 for number in range(count)],
    )


def _trace(requests: list[tuple[int, int | None, str | None]]) -> Trace:
    """Return requests as a trace: a failed one is lost; an answered one stands at its begin."""
    begin_ns = np.array([begin for begin, _, _ in requests], np.int64)
    anchor = np.array([-1 if found is None else found for _, found, _ in requests])
    answered = np.flatnonzero(anchor >= 0)
    return build_trace(
        begin_ns,
        answered.astype(np.uint32),
        anchor[answered].astype(np.uint8),
        begin_ns[answered],
        FOREVER_MS,
    )


@contextmanager
def _program(module: str, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of this package from its first line of output on; then end its input."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"scripts.bench.switching.{module}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        if not process.stdout.readline():
            raise UserError(f"{module} did not start")
        yield process
    finally:
        process.stdin.close()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
