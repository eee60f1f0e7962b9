"""Closes TCP connections on which nobody speaks HTTP.

The server's own limits begin with the first bytes that tell HTTP/1 from HTTP/2. A client that sends
fewer could hold a connection for ever, and enough of those would keep everybody else out.
"""

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Collection

_PREFACE_BYTES = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # RFC 9113, section 3.4
_TCP_INFO_BYTES = 208
_BYTES_RECEIVED_AT = 128  # u64 in struct tcp_info (linux/tcp.h)
_BYTES_SENT_AT = 200


class SilentConnections:
    """Finds them among this process's file descriptors; call `sweep` at regular intervals."""

    def __init__(self, ports: Collection[int]) -> None:
        self._ports = frozenset(ports)
        self._silent: set[int] = set()  # inodes
        self._others: set[int] = set()  # not to be looked at again

    def sweep(self) -> int:
        """Close what was silent at the last sweep already. Returns how many connections."""
        closed = 0
        silent = set()
        others = set()
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - so many Paths are slow
            with contextlib.suppress(OSError):  # closed since
                status = os.fstat(int(name))
                inode = status.st_ino
                if not stat.S_ISSOCK(status.st_mode):
                    continue
                if inode in self._others:
                    others.add(inode)
                    continue
                # A duplicate: the number may become another socket at any time.
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if os.fstat(connection.fileno()).st_ino != inode:
                        continue
                    if not self._is_silent(connection):
                        others.add(inode)
                    elif inode in self._silent:
                        connection.shutdown(socket.SHUT_RDWR)  # the server reads the end, closes
                        closed += 1
                    else:
                        silent.add(inode)
        self._silent, self._others = silent, others
        return closed

    def _is_silent(self, connection: socket.socket) -> bool:
        """Whether nothing was answered yet, and too little came to know the protocol."""
        if (
            connection.family not in (socket.AF_INET, socket.AF_INET6)
            or connection.type != socket.SOCK_STREAM
            or connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            or connection.getsockname()[1] not in self._ports
        ):
            return False
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        if len(info) < _TCP_INFO_BYTES:
            return False  # before Linux 4.19
        (received,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED_AT)
        (sent,) = struct.unpack_from("=Q", info, _BYTES_SENT_AT)
        return bool(received < _PREFACE_BYTES and sent == 0)
