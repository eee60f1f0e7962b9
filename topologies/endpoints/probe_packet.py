"""The probe's datagram: what the sender writes, an echo stamps and a receiver reads.

Little-endian, 24 bytes, then zeros up to the payload size:

    offset  0  magic    uint32
            4  run      uint32   drawn at start; a datagram of another run is malformed
            8  send_ns  int64    CLOCK_REALTIME just before the system call
           16  seq      uint32   counts the packets sent in this flow
           20  flow     uint16
           22  site     uint8    index of the site that sent it, or echoed it
           23  -        uint8    0
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

MAGIC = 0x42505041
STRUCT = struct.Struct("<IIqIHBx")


def header_view(payload: NDArray[np.uint8]) -> NDArray[np.void]:
    """The header fields of rows of payload bytes: a structured array that shares their memory."""
    layout = np.dtype(
        {
            "names": ["magic", "run", "send_ns", "seq", "flow", "site"],
            "formats": ["<u4", "<u4", "<i8", "<u4", "<u2", "u1"],
            "offsets": [0, 4, 8, 16, 20, 22],
            "itemsize": payload.shape[1],
        }
    )
    view: NDArray[np.void] = payload.view(layout)[:, 0]
    return view
