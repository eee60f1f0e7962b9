"""The probe's sockets: opened in each site's namespace by one process, before it forks.

Sockets keep the namespace they were opened in, so that the sender, the receiver and the echo can
each be one process that works in all sites at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from topologies.endpoints.mmsg import SO_RCVBUFFORCE, SO_TIMESTAMPNS
from topologies.endpoints.probe_plan import Direction, Flow, ProbePlan
from topologies.linux import CLONE_NEWNET, setns


class ProbeSocketError(RuntimeError):
    """A socket of the plan could not be opened; the message names flow and site."""


@dataclass(slots=True)
class Endpoint:
    """One socket of one flow at one site."""

    flow: int
    site: int
    sock: socket.socket


@dataclass(slots=True)
class ProbeSockets:
    """The sockets by what is done with them. A roundtrip UE's socket is in two lists."""

    senders: dict[int, list[Endpoint]] = field(default_factory=dict)
    """By flow id; the first one sends first."""
    receivers: list[Endpoint] = field(default_factory=list)
    echoes: list[Endpoint] = field(default_factory=list)


@contextmanager
def in_namespace(path: str) -> Iterator[None]:
    """Have the calling thread work in the network namespace at `path` ("" for its own)."""
    if not path:
        yield
        return
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(path)
        try:
            yield
        finally:
            setns(own, CLONE_NEWNET)
    finally:
        os.close(own)


def open_sockets(plan: ProbePlan, receive_buffer_bytes: int) -> ProbeSockets:
    """Open every socket of the plan. `receive_buffer_bytes` is per receiving socket."""
    sockets = ProbeSockets()
    for flow in plan.flows:
        ue = (flow.ue_address, flow.ue_port)
        service = (flow.service_address, flow.service_port)

        def at(
            name: str,
            bind: tuple[str, int],
            connect: tuple[str, int] | None = None,
            flow: Flow = flow,
        ) -> Endpoint:
            index = plan.site_index(name)
            try:
                with in_namespace(plan.sites[index].netns):
                    sock = _open(bind, connect, receive_buffer_bytes)
            except OSError as error:
                what = f"{bind} to {connect}" if connect else f"{bind}"
                raise ProbeSocketError(f"flow {flow.id} at {name}: {what}: {error}") from error
            return Endpoint(flow.id, index, sock)

        match flow.direction:
            case Direction.UPLINK:
                sockets.receivers += [at(name, service) for name in flow.anchors]
                sockets.senders[flow.id] = [at(flow.ue, ue, service)]
            case Direction.DOWNLINK:
                sockets.receivers.append(at(flow.ue, ue))
                sockets.senders[flow.id] = [at(name, service, ue) for name in flow.anchors]
            case Direction.ROUNDTRIP:
                sockets.echoes += [at(name, service) for name in flow.anchors]
                both = at(flow.ue, ue, service)
                sockets.senders[flow.id] = [both]
                sockets.receivers.append(both)
    return sockets


def _open(
    bind: tuple[str, int], connect: tuple[str, int] | None, receive_buffer_bytes: int
) -> socket.socket:
    family = socket.AF_INET6 if ":" in bind[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.bind(bind)
        if connect:
            sock.connect(connect)
    except OSError:
        sock.close()
        raise
    return sock


def _enter(path: str) -> None:
    fd = os.open(Path(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWNET)
    finally:
        os.close(fd)
