"""Where the daemon listens: Unix sockets and TCP addresses, bound so that nobody slips in.

A Unix socket is there for its owner alone from its first instant (mode 0600); that of a dead
process is replaced, that of a live one is an error. An IPv6 address takes IPv6 only, so a client's
source address is never an IPv4 address in disguise.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

BACKLOG = 1024  # connections that wait to be accepted


class ListenError(Exception):
    """An address cannot be listened on; the message says which and why."""


@dataclass(frozen=True, slots=True)
class TcpListener:
    """A TCP address. `name` is what the application sees; port 0 takes a free one."""

    name: str
    host: IPv4Address | IPv6Address
    port: int

    def __str__(self) -> str:
        return (
            f"[{self.host}]:{self.port}" if self.host.version == 6 else f"{self.host}:{self.port}"
        )


@dataclass(frozen=True, slots=True)
class UnixListener:
    """A Unix socket. `name` is what the application sees."""

    name: str
    path: Path

    def __str__(self) -> str:
        return str(self.path)


Listener = TcpListener | UnixListener


def listen(listener: Listener) -> socket.socket:
    """Bind and listen. Raises ListenError."""
    try:
        if isinstance(listener, UnixListener):
            return _listen_unix(listener.path)
        return _listen_tcp(listener)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ListenError(f"cannot listen on {listener}: {reason}") from error


def bound(listener: Listener, listening: socket.socket) -> Listener:
    """Return the listener with the port that it was given."""
    if isinstance(listener, UnixListener):
        return listener
    return replace(listener, port=listening.getsockname()[1])


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """Remove a Unix socket at the end, if it is still the one that is there now."""
    inode = path.stat().st_ino
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError), _claiming(path):
            if path.stat().st_ino == inode:
                path.unlink()


def _listen_tcp(listener: TcpListener) -> socket.socket:
    family = socket.AF_INET6 if listener.host.version == 6 else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Not SO_REUSEPORT: a second daemon would share the port and take half of the requests.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((str(listener.host), listener.port))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _listen_unix(path: Path) -> socket.socket:
    with _claiming(path):
        _remove_dead(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Linux gives the file the mode of the socket: it is never open to others, and the
            # umask, which all threads share, stays as it is.
            os.fchmod(listening.fileno(), 0o600)
            listening.bind(str(path))
            listening.listen(BACKLOG)
        except BaseException:
            listening.close()
            raise
    return listening


@contextlib.contextmanager
def _claiming(path: Path) -> Iterator[None]:
    """Hold the directory's lock: between two that start at once, one comes first."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _remove_dead(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)  # a live one with a full backlog answers EAGAIN
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "another process listens on it")
