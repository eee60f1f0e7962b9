"""Batches of datagrams through recvmmsg(2) and sendmmsg(2), in numpy buffers.

The standard library has neither call. A `DatagramBatch` owns the buffers and the `mmsghdr` array
that points into them, so that a batch costs one system call and no copy; the caller reads
payloads, lengths and kernel receive stamps as arrays.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket

import numpy as np
from numpy.typing import NDArray

SO_TIMESTAMPNS = 35
SO_RCVBUFFORCE = 33
SO_MEMINFO = 55
SK_MEMINFO_DROPS = 8

_MMSGHDR = np.dtype(
    {
        "names": ["name", "name_len", "iov", "iov_len", "control", "control_len", "flags", "len"],
        "formats": ["u8", "u4", "u8", "u8", "u8", "u8", "i4", "u4"],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56],
        "itemsize": 64,
    }
)
_SOCKADDR_BYTES = 28
_CONTROL_WORDS = 8
# struct cmsghdr { size_t len; int level; int type; } followed by a struct timespec.
_STAMP_CMSG_BYTES = 32
_STAMP_CMSG_KIND = socket.SOL_SOCKET | SO_TIMESTAMPNS << 32

_libc = ctypes.CDLL(None, use_errno=True)
for _call, _extra in ((_libc.recvmmsg, [ctypes.c_void_p]), (_libc.sendmmsg, [])):
    _call.restype = ctypes.c_int
    _call.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_int,
        *_extra,
    ]


class DatagramBatch:
    """Buffers for up to `size` datagrams of up to `payload_bytes` each.

    After `receive` returned n, the first n rows hold what arrived.
    """

    def __init__(self, size: int, payload_bytes: int) -> None:
        self.size = size
        self.payload: NDArray[np.uint8] = np.zeros((size, payload_bytes), np.uint8)
        self._names = np.zeros((size, _SOCKADDR_BYTES), np.uint8)
        self._control = np.zeros((size, _CONTROL_WORDS), np.int64)
        self._iov = np.zeros((size, 2), np.uint64)
        self._iov[:, 0] = _row_addresses(self.payload)
        self._iov[:, 1] = payload_bytes
        self._headers = np.zeros(size, _MMSGHDR)
        self._headers["name"] = _row_addresses(self._names)
        self._headers["name_len"] = _SOCKADDR_BYTES
        self._headers["iov"] = _row_addresses(self._iov)
        self._headers["iov_len"] = 1
        self._headers["control"] = _row_addresses(self._control)
        self._pointer = self._headers.ctypes.data

    def receive(self, fd: int) -> int:
        """Take what is queued on socket `fd`, at most `size` datagrams; never blocks.

        A pending error of the socket (an ICMP answer, say) carries no datagram: it is taken off
        the socket and the read goes on.
        """
        self._headers["control_len"] = _CONTROL_WORDS * 8
        self._headers["name_len"] = _SOCKADDR_BYTES
        while True:
            count = int(_libc.recvmmsg(fd, self._pointer, self.size, socket.MSG_DONTWAIT, None))
            if count >= 0:
                return count
            code = ctypes.get_errno()
            if code == errno.EAGAIN:
                return 0
            if code in (errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK):
                raise OSError(code, os.strerror(code))

    def answer(self, fd: int, first: int, end: int) -> int:
        """Send rows `first` to `end` back to where they came from, with the lengths they had.

        Returns how many were sent; OSError if the first could not be.
        """
        self._iov[first:end, 1] = self._headers["len"][first:end]
        self._headers["control_len"][first:end] = 0
        count = int(
            _libc.sendmmsg(
                fd, self._pointer + first * _MMSGHDR.itemsize, end - first, socket.MSG_DONTWAIT
            )
        )
        code = ctypes.get_errno() if count < 0 else 0
        self._iov[first:end, 1] = self.payload.shape[1]
        if count < 0:
            raise OSError(code, os.strerror(code))
        return count

    def lengths(self, count: int) -> NDArray[np.uint32]:
        """Payload bytes of the first `count` datagrams."""
        lengths: NDArray[np.uint32] = self._headers["len"][:count]
        return lengths

    def stamps_ns(self, count: int) -> NDArray[np.int64]:
        """Kernel receive stamps (SO_TIMESTAMPNS, CLOCK_REALTIME ns); 0 where there is none."""
        control = self._control[:count]
        stamped = (control[:, 0] == _STAMP_CMSG_BYTES) & (control[:, 1] == _STAMP_CMSG_KIND)
        return np.where(stamped, control[:, 2] * 1_000_000_000 + control[:, 3], 0)


def dropped_by_socket(sock: socket.socket) -> int:
    """Datagrams that the kernel dropped at this socket, its buffer being full.

    The counter that SO_RXQ_OVFL attaches to packets, read directly: so that drops which no later
    packet could have told of are counted as well.
    """
    info = np.frombuffer(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 64), np.uint32)
    return int(info[SK_MEMINFO_DROPS])


def _row_addresses(rows: NDArray[np.generic]) -> NDArray[np.uint64]:
    steps = np.arange(rows.shape[0], dtype=np.uint64) * np.uint64(rows.strides[0])
    return np.uint64(rows.ctypes.data) + steps
