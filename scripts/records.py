"""The result folder: the names and columns of its files, written by a run, read by the analysis."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from topologies.endpoints.congestion import Records as QosRecords
from topologies.endpoints.probe_records import (
    RECEIVED_FILE,
    SENT_FILE,
    STATS_FILE,
    UNSENT_FILE,
)

MANIFEST_FILE = "manifest.json"
EPISODES_FILE = "episodes.parquet"
LEASES_FILE = "leases.parquet"
STREAMS_FILE = "streams.parquet"
TOKENS_FILE = "tokens.parquet"
QOS_PARTS_FILE, QOS_SENT_FILE = "parts.parquet", "sent.parquet"
QOS_RECEIVED_FILE, QOS_STREAMS_FILE = "received.parquet", "tcp.parquet"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
PLOTS_FOLDER = "plots"
WITHOUT_PROBES = ("continuity", "qos")  # experiments

Columns = dict[str, NDArray[Any]]


class ResultFolderError(ValueError):
    """A result folder lacks something or contradicts itself; the message names the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One relocation, or for arm `none` a stretch of time in which nothing was relocated.

    Instants are CLOCK_REALTIME ns, 0 where they do not apply.
    """

    episode: int
    arm: str
    ue: str
    source: str
    target: str
    start_ns: int
    """Packets of the UE that were sent from here ..."""
    end_ns: int
    """... to before here belong to the episode."""
    request_ns: int = 0
    prepared_ns: int = 0
    committed_ns: int = 0
    kernel_ack_ns: int = 0
    answered_ns: int = 0
    switched_ns: int = 0
    """The downlink's first packet from the target."""
    epoch: int = 0
    gnb: str = ""
    """The gNB that the UE was handed over to; empty without a handover."""
    handover_ns: int = 0
    """The handover begins ..."""
    path_switched_ns: int = 0
    """... and the paths of the UE are switched, downlink and uplink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One lease that was left to expire. Instants are CLOCK_REALTIME ns."""

    lease: int
    ue: str
    lease_id: str
    requested_ns: int
    """Nothing may pass between the deadline of the UE's last lease and this."""
    kernel_ack_ns: int
    deadline_ns: int
    ttl_ms: int
    controller_killed: bool
    killed_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """One request for a token stream, as its client saw it. Instants: CLOCK_REALTIME ns."""

    episode: int
    client: str
    request: int
    """Within the episode."""
    started_ns: int
    ended_ns: int
    status: int
    anchor: str
    """Which answered."""
    http_version: str
    local_port: int
    """Of the connection."""
    complete: bool
    ending: str
    """What the client saw at the end if that was no good one: timeout, reset, closed, refused or
    failed."""
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a stream, when its client had it (CLOCK_REALTIME ns, in user space)."""

    episode: int
    client: str
    request: int
    number: int
    at_ns: int


_NS, _TEXT = pa.int64(), pa.string()
EPISODES_SCHEMA = pa.schema(
    [("episode", pa.int32())]
    + [(name, _TEXT) for name in ("arm", "ue", "source", "target")]
    + [
        (f"{name}_ns", _NS)
        for name in (
            "start",
            "end",
            "request",
            "prepared",
            "committed",
            "kernel_ack",
            "answered",
            "switched",
        )
    ]
    + [("epoch", pa.int32()), ("gnb", _TEXT), ("handover_ns", _NS), ("path_switched_ns", _NS)]
)
LEASES_SCHEMA = pa.schema(
    [
        ("lease", pa.int32()),
        ("ue", _TEXT),
        ("lease_id", _TEXT),
        ("requested_ns", _NS),
        ("kernel_ack_ns", _NS),
        ("deadline_ns", _NS),
        ("ttl_ms", pa.int32()),
        ("controller_killed", pa.bool_()),
        ("killed_ns", _NS),
    ]
)


_STREAM_KEY = [("episode", pa.int32()), ("client", _TEXT), ("request", pa.int32())]
STREAMS_SCHEMA = pa.schema(
    [
        *_STREAM_KEY,
        ("started_ns", _NS),
        ("ended_ns", _NS),
        ("status", pa.int32()),
        ("anchor", _TEXT),
        ("http_version", _TEXT),
        ("local_port", pa.int32()),
        ("complete", pa.bool_()),
        ("ending", _TEXT),
        ("error", _TEXT),
    ]
)
TOKENS_SCHEMA = pa.schema([*_STREAM_KEY, ("number", pa.int32()), ("at_ns", _NS)])


def write_episodes(folder: Path, episodes: Sequence[Episode]) -> None:
    """Write `episodes.parquet`."""
    table = pa.Table.from_pylist([asdict(episode) for episode in episodes], EPISODES_SCHEMA)
    pq.write_table(table, folder / EPISODES_FILE, compression="zstd")


def write_leases(folder: Path, leases: Sequence[Lease]) -> None:
    """Write `leases.parquet`."""
    table = pa.Table.from_pylist([asdict(lease) for lease in leases], LEASES_SCHEMA)
    pq.write_table(table, folder / LEASES_FILE, compression="zstd")


def write_streams(folder: Path, requests: Sequence[StreamRequest], tokens: Sequence[Token]) -> None:
    """Write `streams.parquet` and `tokens.parquet`."""
    table = pa.Table.from_pylist([asdict(request) for request in requests], STREAMS_SCHEMA)
    pq.write_table(table, folder / STREAMS_FILE, compression="zstd")
    table = pa.Table.from_pylist([asdict(token) for token in tokens], TOKENS_SCHEMA)
    pq.write_table(table, folder / TOKENS_FILE, compression="zstd")


def write_qos(folder: Path, recorded: Sequence[tuple[int, str, str, QosRecords]]) -> None:
    """Write what each part (round, arm, direction) of a QoS run has recorded."""
    rows = [
        {
            "part": part,
            "round": number,
            "arm": arm,
            "direction": direction,
            "start_ns": records.start_ns,
            "end_ns": records.end_ns,
        }
        for part, (number, arm, direction, records) in enumerate(recorded)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / QOS_PARTS_FILE, compression="zstd")
    for name, recorded_columns in (
        (QOS_SENT_FILE, [records.sent for *_, records in recorded]),
        (QOS_RECEIVED_FILE, [records.received for *_, records in recorded]),
        (QOS_STREAMS_FILE, [records.streams for *_, records in recorded]),
    ):
        tables = []
        for part, one_part in enumerate(recorded_columns):
            columns = {key: np.asarray(one) for key, one in one_part.items()}
            length = len(next(iter(columns.values())))
            tables.append(pa.table({"part": np.full(length, part, np.int32), **columns}))
        pq.write_table(pa.concat_tables(tables), folder / name, compression="zstd")


@dataclass(frozen=True, slots=True, kw_only=True)
class QosPart:
    """One arm of a QoS run in one direction. Instants are CLOCK_REALTIME ns."""

    round: int
    arm: str
    direction: str
    start_ns: int
    end_ns: int
    sent: Columns
    received: Columns
    stream_at_ns: NDArray[Any]
    stream_bytes: NDArray[Any]


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON as the folder's files have it: indented, one newline at the end, no NaN."""
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True, slots=True)
class FlowEntry:
    """What the analysis needs of a flow of the manifest."""

    id: int
    ue: str
    direction: str


class ResultFolder:
    """A finished run, read from disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = self._json(MANIFEST_FILE)
        try:
            self.experiment: str = self.manifest["experiment"]
            self.seed = int(self.manifest["seed"])
            probed = self.manifest
            if self.experiment in WITHOUT_PROBES:
                probed = {"rate_pps": 0, "waiting_time_ms": 0, "sites": [], "flows": []}
            self.rate_pps = int(probed["rate_pps"])
            self.waiting_time_ms = int(probed["waiting_time_ms"])
            self.sites: list[str] = [site["name"] for site in probed["sites"]]
            self.flows = [
                FlowEntry(int(flow["id"]), flow["ue"], flow["direction"])
                for flow in probed["flows"]
            ]
        except (KeyError, TypeError) as error:
            raise ResultFolderError(f"{path / MANIFEST_FILE}: {error!r}") from error

    @property
    def interval_ns(self) -> int:
        """Time between two packets of a flow."""
        return 1_000_000_000 // self.rate_pps

    def sent(self) -> Columns:
        """`sent.parquet` by column."""
        return self._columns(SENT_FILE)

    def received(self) -> Columns:
        """`received.parquet` by column."""
        return self._columns(RECEIVED_FILE)

    def unsent(self) -> Columns:
        """`unsent.parquet` by column."""
        return self._columns(UNSENT_FILE)

    def probe(self) -> dict[str, Any]:
        """`probe.json`."""
        return self._json(STATS_FILE)

    def summary(self) -> dict[str, Any]:
        """`summary.json`."""
        return self._json(SUMMARY_FILE)

    def episodes(self) -> list[Episode]:
        """`episodes.parquet`, in order."""
        return [Episode(**row) for row in self._table(EPISODES_FILE).to_pylist()]

    def qos(self) -> list[QosPart]:
        """The parts of a QoS run, in order."""
        columns = [
            self._columns(name) for name in (QOS_SENT_FILE, QOS_RECEIVED_FILE, QOS_STREAMS_FILE)
        ]
        parts = []
        for row in self._table(QOS_PARTS_FILE).to_pylist():
            part = row.pop("part")
            sent, received, streams = (
                {key: values[one["part"] == part] for key, values in one.items()} for one in columns
            )
            parts.append(
                QosPart(
                    **row,
                    sent=sent,
                    received=received,
                    stream_at_ns=streams["at_ns"],
                    stream_bytes=streams["bytes"],
                )
            )
        return parts

    def leases(self) -> list[Lease]:
        """`leases.parquet`, in order."""
        return [Lease(**row) for row in self._table(LEASES_FILE).to_pylist()]

    def streams(self) -> list[StreamRequest]:
        """`streams.parquet`, in order."""
        return [StreamRequest(**row) for row in self._table(STREAMS_FILE).to_pylist()]

    def tokens(self) -> list[Token]:
        """`tokens.parquet`, in order."""
        return [Token(**row) for row in self._table(TOKENS_FILE).to_pylist()]

    def _columns(self, name: str) -> Columns:
        table = self._table(name)
        return {column: np.asarray(table[column]) for column in table.column_names}

    def _table(self, name: str) -> pa.Table:
        return pq.read_table(self._existing(name))

    def _json(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self._existing(name).read_text())
        return values

    def _existing(self, name: str) -> Path:
        path = self.path / name
        if not path.exists():
            raise ResultFolderError(f"{path}: not there")
        return path
