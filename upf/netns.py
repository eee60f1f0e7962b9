"""Network namespaces: run something inside one, or make an anonymous one.

A namespace made here has no name and no process: a file descriptor holds it, so it vanishes with
the last process that has it open, however that process ends.
"""

import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from pyroute2 import IPRoute
from pyroute2.netns import setns

Result = TypeVar("Result")
CLONE_NEWNET = 0x40000000


def in_namespace(path: str, function: Callable[[], Result]) -> Result:
    """Call `function` in a thread that has entered the network namespace at `path`.

    Sockets that it opens stay in that namespace when they are used from anywhere else.
    """
    return _in_thread(lambda: setns(path), function)


def _in_thread(enter: Callable[[], object], function: Callable[[], Result]) -> Result:
    results: list[Result] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            enter()
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body, name="in-namespace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def route_socket(path: str) -> IPRoute:
    """Open pyroute2's route socket in the network namespace at `path`.

    Not by `IPRoute(netns=path)`: that forks a process per socket, and with many of them open
    replies were seen to be lost.
    """

    def make() -> int:
        handle = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE)
        return handle.detach()

    return IPRoute(fileno=in_namespace(path, make))


class Namespace:
    """An anonymous network namespace with `lo` up; `path` opens it from this process or a child."""

    def __init__(self) -> None:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)

        def unshare() -> None:
            if libc.unshare(CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot make a network namespace: {os.strerror(code)}")

        own = "/proc/thread-self/ns/net"
        self.fd: int = _in_thread(unshare, lambda: os.open(own, os.O_RDONLY | os.O_CLOEXEC))
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        with self.links() as links:
            links.link("set", index=1, state="up")

    def links(self) -> IPRoute:
        """Open a route socket inside."""
        return route_socket(self.path)

    def run(self, function: Callable[[], Result]) -> Result:
        """Call `function` inside."""
        return in_namespace(self.path, function)

    def close(self) -> None:
        """Let go of the namespace."""
        os.close(self.fd)

    def __enter__(self) -> "Namespace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    left: Namespace, left_name: str, right: Namespace, right_name: str, *cidrs: tuple[str, str]
) -> None:
    """Join two namespaces by a veth pair; each of `cidrs` is (left, right) as address/length."""
    with left.links() as links:
        links.link(
            "add",
            ifname=left_name,
            kind="veth",
            peer={"ifname": right_name, "net_ns_fd": right.fd},
        )
    for namespace, name, side in ((left, left_name, 0), (right, right_name, 1)):
        with namespace.links() as links:
            index = links.link_lookup(ifname=name)[0]
            for cidr in cidrs:
                address, length = cidr[side].split("/")
                flags = {"flags": 0x02} if ":" in address else {}  # IFA_F_NODAD
                links.addr("add", index=index, address=address, prefixlen=int(length), **flags)
            links.link("set", index=index, state="up")
