"""What the probe leaves on disk: the columns of its Parquet files, written when it is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from topologies.endpoints.probe_plan import ProbePlan
from topologies.endpoints.probe_receiver import RECEIVED
from topologies.endpoints.probe_sender import SendLog

SENT_FILE = "sent.parquet"
RECEIVED_FILE = "received.parquet"
UNSENT_FILE = "unsent.parquet"
STATS_FILE = "probe.json"

SENT_SCHEMA = pa.schema(
    [("flow", pa.uint16()), ("seq", pa.uint32()), ("site", pa.uint8()), ("send_ns", pa.int64())]
)
RECEIVED_SCHEMA = pa.schema(
    [("flow", pa.uint16()), ("seq", pa.uint32()), ("site", pa.uint8()), ("recv_ns", pa.int64())]
)
UNSENT_SCHEMA = pa.schema(
    [("flow", pa.uint16()), ("at_ns", pa.int64()), ("errno", pa.int32()), ("count", pa.uint32())]
)
_ROWS = 1 << 20
_COMPRESSION = "zstd"


def write_sent(folder: Path, plan: ProbePlan, log: SendLog, flows: list[dict[str, Any]]) -> None:
    """Write `sent.parquet`, flow by flow in order of sequence number.

    `flows` are the sender's figures in the order of the plan: how many each flow sent, and where
    its source was switched.
    """
    with pq.ParquetWriter(folder / SENT_FILE, SENT_SCHEMA, compression=_COMPRESSION) as writer:
        for position, (flow, figures) in enumerate(zip(plan.flows, flows, strict=True)):
            send_ns = log.send_ns(position, figures["sent"])
            source = flow.anchors[0] if flow.direction == "downlink" else flow.ue
            sites = np.full(len(send_ns), plan.site_index(source), np.uint8)
            for switch in figures["switches"]:
                sites[switch["first_seq"] :] = switch["site"]
            seq = np.arange(len(send_ns), dtype=np.uint32)
            for begin in range(0, len(send_ns), _ROWS):
                rows = slice(begin, begin + _ROWS)
                ids = np.full(len(seq[rows]), flow.id, np.uint16)
                writer.write_table(_table(SENT_SCHEMA, ids, seq[rows], sites[rows], send_ns[rows]))


def write_received(folder: Path, spool: Path) -> None:
    """Turn the receiver's spool into `received.parquet`, in the order of reading; remove it."""
    with (
        pq.ParquetWriter(folder / RECEIVED_FILE, RECEIVED_SCHEMA, compression=_COMPRESSION) as out,
        spool.open("rb") as file,
    ):
        while len(rows := np.fromfile(file, RECEIVED, _ROWS)):
            columns = [np.ascontiguousarray(rows[n]) for n in ("flow", "seq", "site", "recv_ns")]
            out.write_table(_table(RECEIVED_SCHEMA, *columns))
    spool.unlink()


def write_unsent(folder: Path, rows: list[list[int]]) -> None:
    """Write `unsent.parquet`: packets that were due and not sent (flow, at_ns, errno, count)."""
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    types = (np.uint16, np.int64, np.int32, np.uint32)
    arrays = [column.astype(kind) for column, kind in zip(columns, types, strict=True)]
    pq.write_table(_table(UNSENT_SCHEMA, *arrays), folder / UNSENT_FILE, compression=_COMPRESSION)


def _table(schema: pa.Schema, *columns: NDArray[Any]) -> pa.Table:
    return pa.table([pa.array(column) for column in columns], schema=schema)
