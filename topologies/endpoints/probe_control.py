"""What the probe's processes share: stop flags, the active source of each flow, process set-up.

One page of shared memory, written by the parent and read by its children between two packets.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import signal
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from topologies.linux import PR_SET_PDEATHSIG, PR_SET_TIMERSLACK, prctl, set_priority

_SENDER, _RECEIVERS, _FIRST_SOURCE = 0, 1, 64

READY = b"\n"
"""What a child writes to its result pipe once it works; its JSON result follows when it ends."""


class ControlBlock:
    """Shared flags. A flow is addressed by its position in the plan, a source by its site index."""

    def __init__(self, flows: int) -> None:
        self._bytes = mmap.mmap(-1, _FIRST_SOURCE + flows)

    def stop_sender(self) -> None:
        """Have the sender end before its next packet."""
        self._bytes[_SENDER] = 1

    def stop_receivers(self) -> None:
        """Have receiver and echo take what is queued, and end."""
        self._bytes[_RECEIVERS] = 1

    @property
    def receivers_stopped(self) -> bool:
        """Whether `stop_receivers` was called."""
        return self._bytes[_RECEIVERS] != 0

    def set_source(self, position: int, site: int) -> bool:
        """Name the site from which a flow is to be sent from now on; False if it is already."""
        changed = self._bytes[_FIRST_SOURCE + position] != site
        self._bytes[_FIRST_SOURCE + position] = site
        return changed

    def sender_view(self) -> tuple[mmap.mmap, int, int]:
        """(memory, offset of the sender's stop flag, offset of flow 0's source): one index a look.

        The sender reads these per packet, where a method call would cost more than the read.
        """
        return self._bytes, _SENDER, _FIRST_SOURCE


@dataclass(frozen=True, slots=True)
class SourceSwitch:
    """The sender's word that a flow is now sent from another site."""

    STRUCT = struct.Struct("<HBIq")

    flow: int
    site: int
    first_seq: int
    """The first sequence number that the new source sends."""
    at_ns: int
    """CLOCK_REALTIME just before that packet was sent."""

    def pack(self) -> bytes:
        """As bytes for a pipe; below PIPE_BUF, so written whole."""
        return self.STRUCT.pack(self.flow, self.site, self.first_seq, self.at_ns)

    @classmethod
    def unpack(cls, data: bytes) -> SourceSwitch:
        """Read what `pack` wrote."""
        return cls(*cls.STRUCT.unpack(data))


@dataclass(frozen=True, slots=True)
class Child:
    """A forked process and the pipe on which it reports."""

    name: str
    pid: int
    result_fd: int


def fork_child(name: str, nice: int, work: Callable[[Callable[[], None]], dict[str, Any]]) -> Child:
    """Run `work(ready)` in a forked process that dies with this one.

    `work` calls `ready` once it is able to do its job; what it returns is written to the pipe as
    JSON. A child that fails writes its traceback to stderr and nothing to the pipe.
    """
    parent = os.getpid()
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_fd)
        return Child(name, pid, read_fd)
    status = 1
    try:
        # The parent tells children when to stop; a terminal's Ctrl-C must not overtake it.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_TIMERSLACK, 1)
        if os.getppid() != parent:
            os._exit(1)
        set_priority(0, nice)
        gc.freeze()
        gc.disable()
        result = work(lambda: _write_all(write_fd, READY))
        _write_all(write_fd, json.dumps(result).encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
