"""The fleet: which anchors (AEXFs) there are, whose they are, and whether they are alive.

As with leases, decisions return events and change nothing durable: the caller makes them durable,
then `fold` applies them, now and at replay. Heartbeats are soft state and never journalled.

An anchor is monitored (`monitor`) from its first heartbeat on. One that never sends any is UP until
somebody finds it dead (`suspect`), and whether it is ready must be asked. After a restart of the
controller this holds for every anchor until it is heard.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from controlplane.catalogue import Anchor
from controlplane.clock import NS_PER_MS
from controlplane.monitor import SIGNS_PER_BUDGET, Monitor
from controlplane.resolver import AnchorState, AnchorView


@dataclass(frozen=True, slots=True)
class AnchorRegistered:
    """A provider offers this anchor, or offers it anew with other properties; ends a drain."""

    anchor: Anchor
    provider: str


@dataclass(frozen=True, slots=True)
class AnchorDraining:
    """The anchor takes no new sessions."""

    name: str


@dataclass(frozen=True, slots=True)
class AnchorDeregistered:
    """The anchor is offered no more."""

    name: str


@dataclass(frozen=True, slots=True)
class AnchorFailed:
    """The anchor is dead, or has lost the state of its sessions."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class AnchorRecovered:
    """A failed anchor gives signs of life."""

    name: str


AnchorEvent = (
    AnchorRegistered | AnchorDraining | AnchorDeregistered | AnchorFailed | AnchorRecovered
)
Events = tuple[AnchorEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What an anchor says of itself."""

    boot_id: str  # another one after each start of the anchor
    load: float  # 0 to 1
    ready_aisis: frozenset[str]  # services that can take a session now
    slots_used: int | None = None  # as it counts itself; admission counts leases instead
    latency_ms: float | None = None  # of a request there, measured


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorStatus:
    """All that is known of an anchor, for people and programs that ask."""

    anchor: Anchor
    provider: str
    state: AnchorState
    failure: str | None  # why it is DOWN
    heartbeat: Heartbeat | None  # the last one
    heard_ns: int | None  # when that came, CLOCK_MONOTONIC


class FleetError(Exception):
    """A request that the fleet does not allow; `cause` is for programs."""

    def __init__(self, cause: str, why: str) -> None:
        self.cause = cause
        super().__init__(why)


@dataclass(slots=True)
class _Durable:
    anchor: Anchor
    provider: str
    draining: bool = False
    failure: str | None = None


class Fleet:
    """Anchors by name. Not thread-safe."""

    def __init__(
        self,
        anchors: Iterable[Anchor],
        attachment_points: Collection[str],
        *,
        budget_ms: int = 200,
    ) -> None:
        """`anchors`: those of the catalogue. `attachment_points`: names the user plane has.

        `budget_ms`: failure-detection budget. Raises FleetError if an anchor is no such point.
        """
        self._monitor = Monitor(budget_ms * NS_PER_MS)
        self._points = frozenset(attachment_points)
        self._anchors: dict[str, Anchor] = {}
        self._durable: dict[str, _Durable] = {}
        self._heartbeats: dict[str, Heartbeat] = {}  # the last one of each
        self._said_ns: dict[str, int] = {}  # failure or recovery, not folded yet
        self._views: dict[str, AnchorView] = {}  # those that are not outdated
        for anchor in anchors:
            self._check_point(anchor.name)
            self.fold(AnchorRegistered(anchor, anchor.provider))

    # What is

    @property
    def heartbeat_interval_ns(self) -> int:
        """How often an anchor that is monitored shall send a heartbeat."""
        return self._monitor.budget_ns // SIGNS_PER_BUDGET

    @property
    def next_check_ns(self) -> int | None:
        """When to call `check` next, CLOCK_MONOTONIC; None: nobody is monitored."""
        return self._monitor.next_check_ns

    @property
    def anchors(self) -> Mapping[str, Anchor]:
        """The anchors that are offered, by name; a live view."""
        return MappingProxyType(self._anchors)

    def anchor(self, name: str) -> Anchor | None:
        """Return an anchor; None if there is none of this name."""
        return self._anchors.get(name)

    def provider(self, name: str) -> str | None:
        """Return whose anchor it is; None if there is none of this name."""
        durable = self._durable.get(name)
        return None if durable is None else durable.provider

    def state(self, name: str) -> AnchorState | None:
        """Return whether an anchor takes sessions; None if there is none of this name."""
        return self._state(name) if name in self._durable else None

    def statuses(self) -> Iterator[AnchorStatus]:
        """Yield all that is known, anchor by anchor."""
        for name, durable in self._durable.items():
            yield AnchorStatus(
                anchor=durable.anchor,
                provider=durable.provider,
                state=self._state(name),
                failure=durable.failure,
                heartbeat=self._heartbeats.get(name),
                heard_ns=self._monitor.heard_ns(name),
            )

    def views(self, slots_used: Mapping[str, int]) -> list[AnchorView]:
        """Return every anchor as the resolver wants it. `slots_used`: by name."""
        views, found = self._views, []
        for name in self._anchors:
            used = slots_used.get(name, 0)
            view = views.get(name)
            if view is None or view.slots_used != used:
                view = views[name] = self._view(name, used)
            found.append(view)
        return found

    def to_probe(self) -> list[str]:
        """Return failed anchors that send no heartbeats: only a probe finds them alive again."""
        return [
            name
            for name, durable in self._durable.items()
            if durable.failure is not None and name not in self._monitor
        ]

    # What providers and the operator ask for

    def register(self, anchor: Anchor, provider: str) -> Events:
        """Offer an anchor as `provider`, whatever it says its provider is; or offer it anew.

        With fewer slots than are in use it is just full. One that failed is DOWN until it is heard.
        Raises FleetError: no such attachment point, or another provider's anchor.
        """
        self._check_point(anchor.name)
        known = self._durable.get(anchor.name)
        if known is not None and known.provider != provider:
            raise FleetError("ANCHOR_OWNED", f"{anchor.name} is another provider's anchor")
        anchor = anchor.model_copy(update={"provider": provider})
        if known is not None and known.anchor == anchor and not known.draining:
            return ()
        return (AnchorRegistered(anchor, provider),)

    def drain(self, name: str, provider: str | None = None) -> Events:
        """Let an anchor take no new sessions. `provider`: who asks; None: the operator."""
        durable = self._owned(name, provider)
        return () if durable.draining else (AnchorDraining(name),)

    def deregister(self, name: str, provider: str | None = None) -> Events:
        """Withdraw an anchor. Its sessions are the caller's to move. `provider` as above."""
        self._owned(name, provider)
        return (AnchorDeregistered(name),)

    # Signs of life and of death

    def heartbeat(self, name: str, now_ns: int, heartbeat: Heartbeat) -> Events:
        """Take a heartbeat, read at `now_ns`. Raises FleetError if there is no such anchor.

        An anchor that has been started anew (another boot id) has lost its sessions' state, which
        is a failure and a recovery: both events are returned, and its sessions are to be recovered.
        """
        durable = self._get(name)
        before = self._heartbeats.get(name)
        self._heartbeats[name] = heartbeat
        self._monitor.heard(name, now_ns)
        self._views.pop(name, None)
        if durable.failure is not None:
            return self._say(now_ns, AnchorRecovered(name))
        if before is not None and before.boot_id != heartbeat.boot_id:
            return (AnchorFailed(name, "it was started anew"), AnchorRecovered(name))
        return ()

    def check(self, now_ns: int) -> Events:
        """Return whom to declare failed. To be called at `next_check_ns`; idle before that."""
        failed: list[AnchorEvent] = []
        for name, silent_ns in self._monitor.check(now_ns).items():
            if self._durable[name].failure is None:
                why = f"it has been silent for {silent_ns // NS_PER_MS} ms"
                failed += self._say(now_ns, AnchorFailed(name, why))
        return tuple(failed)

    def suspect(self, name: str, why: str, now_ns: int) -> Events:
        """Take it that an anchor refused a connection: nothing serves there (not: it was slow).

        An anchor that sends no heartbeats has failed at once: no silence would ever tell. Of one
        that sends them, they are the better witness: it gets half a budget to be heard.
        """
        durable = self._durable.get(name)
        if durable is None or durable.failure is not None:
            return ()
        if name not in self._monitor:
            return self._say(now_ns, AnchorFailed(name, why))
        self._monitor.doubt(name, now_ns)
        return ()

    def answered(self, name: str, now_ns: int) -> Events:
        """Take it that a failed anchor among `to_probe` has answered a probe."""
        if name not in self.to_probe():
            return ()
        return self._say(now_ns, AnchorRecovered(name))

    # Changes

    def fold(self, event: AnchorEvent) -> None:
        """Let a durable event take effect. Events of anchors that are gone change nothing."""
        name = event.anchor.name if isinstance(event, AnchorRegistered) else event.name
        self._views.pop(name, None)
        self._said_ns.pop(name, None)
        durable = self._durable.get(name)
        match event:
            case AnchorRegistered(anchor, provider):
                failure = None if durable is None else durable.failure
                self._durable[name] = _Durable(anchor, provider, failure=failure)
                self._anchors[name] = anchor
            case _ if durable is None:
                pass
            case AnchorDraining():
                durable.draining = True
            case AnchorDeregistered():
                del self._durable[name], self._anchors[name]
                self._heartbeats.pop(name, None)
                self._monitor.forget(name)
            case AnchorFailed(_, why):
                durable.failure = why
            case AnchorRecovered():
                durable.failure = None

    def _say(self, now_ns: int, event: AnchorFailed | AnchorRecovered) -> Events:
        """Return an event, unless one was returned within a budget that is not folded yet."""
        said_ns = self._said_ns.get(event.name)
        if said_ns is not None and now_ns < said_ns + self._monitor.budget_ns:
            return ()
        self._said_ns[event.name] = now_ns
        return (event,)

    def _state(self, name: str) -> AnchorState:
        durable = self._durable[name]
        if durable.failure is not None or name not in self._points:
            return AnchorState.DOWN
        return AnchorState.DRAINING if durable.draining else AnchorState.UP

    def _view(self, name: str, slots_used: int) -> AnchorView:
        heartbeat = self._heartbeats.get(name)
        return AnchorView(
            anchor=self._anchors[name],
            slots_used=slots_used,
            state=self._state(name),
            load=0.0 if heartbeat is None else heartbeat.load,
            latency_ms=None if heartbeat is None else heartbeat.latency_ms,
            ready_aisis=None if heartbeat is None else heartbeat.ready_aisis,
        )

    def _check_point(self, name: str) -> None:
        if name not in self._points:
            raise FleetError("ATTACHMENT_POINT_UNKNOWN", f"{name} is no attachment point")

    def _get(self, name: str) -> _Durable:
        durable = self._durable.get(name)
        if durable is None:
            raise FleetError("ANCHOR_UNKNOWN", f"there is no anchor {name}")
        return durable

    def _owned(self, name: str, provider: str | None) -> _Durable:
        durable = self._get(name)
        if provider not in (None, durable.provider):
            raise FleetError("ANCHOR_OWNED", f"{name} is another provider's anchor")
        return durable
