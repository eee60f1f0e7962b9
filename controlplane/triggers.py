"""Triggers: who should move to another anchor, and why.

Pure: reports come in, sessions to act on come out; whether there is a better place is the
resolver's to say (`should_move`). Three things keep sessions from hopping about:

- hysteresis: an anchor is under pressure when its load or latency has been high for a while, and
  until it is low, which is well below;
- a bounded share of an anchor's sessions leaves for pressure in a period, and no more than the
  excess load calls for, so that the herd does not jump to the next anchor;
- dwell time: a session that has moved, or was chosen to, is not chosen again for a while. A
  handover within that time waits for its end. What must move (DRAIN, FAILURE, POLICY) moves.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from controlplane.clock import NS_PER_MS
from controlplane.fleet import (
    AnchorDeregistered,
    AnchorDraining,
    AnchorEvent,
    AnchorFailed,
    Heartbeat,
)

MARGIN = 0.2  # of the resolver's score; as much as 20 ms of latency, or a fifth of an anchor's load


class Trigger(StrEnum):
    """Why a session is to move."""

    HANDOVER = "HANDOVER"  # its UE is in another cell
    LOAD = "LOAD"  # its anchor has too much to do
    LATENCY = "LATENCY"  # its anchor takes too long
    DRAIN = "DRAIN"  # its anchor is being withdrawn
    FAILURE = "FAILURE"  # its anchor is dead
    POLICY = "POLICY"  # its tenant may not be served there any more
    REQUEST = "REQUEST"  # somebody asked for it


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerSettings:
    """Thresholds and time limits. ValueError if they make no sense together."""

    load_high: float = 0.9  # of 1; pressure begins at it
    load_low: float = 0.7  # and ends at it; what leaves brings the load down to it
    latency_high_ms: float = 200.0  # of a request at the anchor
    latency_low_ms: float = 150.0
    hold_ms: int = 500  # so long it must be high
    period_ms: int = 1_000
    max_share: float = 0.1  # of an anchor's sessions that leave in a period; at least one may
    dwell_ms: int = 5_000

    def __post_init__(self) -> None:
        if not 0 <= self.load_low < self.load_high:
            raise ValueError("load_low must be below load_high")
        if not 0 <= self.latency_low_ms < self.latency_high_ms:
            raise ValueError("latency_low_ms must be below latency_high_ms")
        if not 0 < self.max_share <= 1:
            raise ValueError("max_share must be above 0 and at most 1")
        if self.hold_ms < 0 or self.period_ms <= 0 or self.dwell_ms < 0:
            raise ValueError("hold_ms and dwell_ms must not be negative, period_ms be positive")


class Hysteresis:
    """Whether a value counts as high: from `high` on, if for `hold_ns`, until it is at `low`."""

    def __init__(self, high: float, low: float, hold_ns: int) -> None:
        self.raised = False
        self._high = high
        self._low = low
        self._hold_ns = hold_ns
        self._since_ns: int | None = None  # since when the value has been high

    def update(self, value: float, now_ns: int) -> bool:
        """Take the present value; return whether it counts as high."""
        if self.raised:
            self.raised = value > self._low
            self._since_ns = None
        elif value < self._high:
            self._since_ns = None
        else:
            if self._since_ns is None:
                self._since_ns = now_ns
            self.raised = now_ns - self._since_ns >= self._hold_ns
        return self.raised


@dataclass(frozen=True, slots=True)
class Pressure:
    """An anchor that some of its sessions should leave."""

    anchor: str
    trigger: Trigger  # LOAD or LATENCY
    share: float  # of its sessions, in this period


@dataclass(slots=True)
class _Anchor:
    load: Hysteresis
    latency: Hysteresis
    next_ns: int = 0  # when the next period begins


class Triggers:
    """What has been reported of anchors, and when sessions moved. Not thread-safe."""

    def __init__(self, settings: TriggerSettings) -> None:
        self._settings = settings
        self._anchors: dict[str, _Anchor] = {}
        self._dwelling: dict[str, int] = {}  # session -> until when; the earliest end is first
        self._waiting: dict[str, None] = {}  # sessions whose handover waits for that, in order

    # Anchors

    def heartbeat(self, anchor: str, heartbeat: Heartbeat, now_ns: int) -> list[Pressure]:
        """Take a heartbeat; return why sessions should leave, if any may in this period."""
        state = self._anchors.get(anchor)
        if state is None:
            state = self._anchors[anchor] = self._watch()
        settings = self._settings
        too_loaded = state.load.update(heartbeat.load, now_ns)
        too_slow = heartbeat.latency_ms is not None and state.latency.update(
            heartbeat.latency_ms, now_ns
        )
        if now_ns < state.next_ns:
            return []
        if too_loaded:
            excess = 1 - settings.load_low / heartbeat.load
            return [Pressure(anchor, Trigger.LOAD, min(excess, settings.max_share))]
        if too_slow:
            return [Pressure(anchor, Trigger.LATENCY, settings.max_share)]
        return []

    def choose(self, pressure: Pressure, sessions: Sequence[str], now_ns: int) -> list[str]:
        """Choose whom to move for a pressure; the rest of the period nobody else is chosen.

        `sessions`: all of the anchor's, those that should leave first in front.
        """
        self._settle(now_ns)
        state = self._anchors[pressure.anchor]
        if now_ns < state.next_ns:
            return []
        state.next_ns = now_ns + self._settings.period_ms * NS_PER_MS
        free = [session_id for session_id in sessions if session_id not in self._dwelling]
        chosen = free[: max(1, math.floor(len(sessions) * pressure.share))]
        for session_id in chosen:
            self.moved(session_id, now_ns)
        return chosen

    def of_event(self, event: AnchorEvent) -> Trigger | None:
        """Return why all sessions must leave an anchor that this has happened to; None: they stay.

        What was reported of it before counts no more.
        """
        match event:
            case AnchorFailed(name):
                trigger = Trigger.FAILURE
            case AnchorDraining(name) | AnchorDeregistered(name):
                trigger = Trigger.DRAIN
            case _:
                return None
        self._anchors.pop(name, None)
        return trigger

    # Sessions

    def handover(self, sessions: Iterable[str], now_ns: int) -> list[str]:
        """Take a UE's handover; return which of its sessions may move now.

        The others moved only just, and come out of `due` when they may.
        """
        self._settle(now_ns)
        free = []
        for session_id in sessions:
            if session_id in self._dwelling:
                self._waiting[session_id] = None
            else:
                free.append(session_id)
        return free

    def next_due_ns(self) -> int | None:
        """Return when `due` will return somebody (0: now); None: nobody waits."""
        return min(
            (self._dwelling.get(session_id, 0) for session_id in self._waiting), default=None
        )

    def due(self, now_ns: int) -> list[str]:
        """Return the sessions whose handover has waited long enough."""
        self._settle(now_ns)
        due = [session_id for session_id in self._waiting if session_id not in self._dwelling]
        for session_id in due:
            del self._waiting[session_id]
        return due

    def moved(self, session_id: str, now_ns: int) -> None:
        """Take it that a session has moved, for whatever reason: it dwells there for a while."""
        self._dwelling.pop(session_id, None)
        self._dwelling[session_id] = now_ns + self._settings.dwell_ms * NS_PER_MS

    def _settle(self, now_ns: int) -> None:
        """Forget dwell times that are over."""
        while self._dwelling:
            session_id = next(iter(self._dwelling))
            if self._dwelling[session_id] > now_ns:
                return
            del self._dwelling[session_id]

    def _watch(self) -> _Anchor:
        settings = self._settings
        hold_ns = settings.hold_ms * NS_PER_MS
        return _Anchor(
            Hysteresis(settings.load_high, settings.load_low, hold_ns),
            Hysteresis(settings.latency_high_ms, settings.latency_low_ms, hold_ns),
        )


def should_move(here: float | None, there: float, margin: float = MARGIN) -> bool:
    """Whether the best other anchor is worth a move. Scores are the resolver's: lower is better.

    `here`: None if the present anchor breaks a constraint now; then any other is better.
    """
    return here is None or here - there > margin
