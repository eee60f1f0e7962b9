"""Admission: an anchor's slot and bandwidth on the path to it, both or neither.

`Pools` counts, in integers, what live leases have reserved of five resources: an anchor's slots,
its N6 link in both directions, a cell in both directions. PREPARE asks `try_reserve`, which takes
all that a lease demands or nothing. What has already happened is never refused: `hold` (a
journalled lease) and `move_cell` (a handover) may overdraw a pool, as may an anchor that registers
anew with fewer slots. An overdrawn pool gives nothing more until enough has been released.

While a session relocates, its two leases carry the same traffic: of a cell it takes the larger of
their demands, once. Slots and N6 are taken at both anchors.

Who has to make room is `victims`: pre-emption by ARP (TS 23.501, 5.7.2.2).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import StrEnum

from controlplane.catalogue import Anchor
from controlplane.values import value


class Resource(StrEnum):
    """What there are pools of."""

    ANCHOR_SLOTS = "anchorSlots"
    N6_DOWNLINK = "n6Downlink"  # bit/s, as the following
    N6_UPLINK = "n6Uplink"
    CELL_DOWNLINK = "cellDownlink"
    CELL_UPLINK = "cellUplink"


@value(frozen=True, slots=True)
class Demand:
    """What one lease needs: a slot at its anchor, if it has one, and guaranteed rates (GFBR)."""

    anchor: str | None
    cell: str | None
    downlink_bps: int
    uplink_bps: int


@value(frozen=True, slots=True)
class Rates:
    """Capacity of a cell; None: unlimited."""

    downlink_bps: int | None = None
    uplink_bps: int | None = None


@value(frozen=True, slots=True)
class Shortage:
    """Why a demand does not fit: the first resource of which too little is free."""

    resource: Resource
    where: str  # the anchor or the cell
    asked: int  # slots or bit/s
    free: int

    def __str__(self) -> str:
        unit = "" if self.resource is Resource.ANCHOR_SLOTS else " bit/s"
        return f"{self.resource} of {self.where}: {self.asked:,}{unit} asked, {self.free:,} free"


@value(frozen=True, slots=True, kw_only=True)
class Holder:
    """A live lease that pre-emption may consider, with its ARP (TS 23.501, 5.7.2.2)."""

    lease_id: str
    session_id: str
    priority_level: int  # 1 to 15; 1 is the most important
    vulnerable: bool  # a more important one may take what this holds


@value(frozen=True, slots=True)
class _Pool:
    resource: Resource
    capacity: Callable[[str], int | None]  # None: unlimited
    used: dict[str, int]

    def short_by(self, where: str, more: int) -> int:
        """How much has to be released before `more` fits; not positive if it fits now."""
        capacity = self.capacity(where)
        return 0 if capacity is None else self.used.get(where, 0) + more - capacity


_Part = tuple[_Pool, str, int]  # so much more of the pool, at this anchor or cell


class Pools:
    """Capacities, and what live leases have reserved of them."""

    def __init__(self, anchors: Mapping[str, Anchor], cells: Mapping[str, Rates]) -> None:
        """Both mappings are read again for each decision: pass the fleet's own, and it is followed.

        An anchor or a cell that is in neither has no capacity.
        """
        self._anchors = anchors
        self._cells = cells
        self._slots = _Pool(Resource.ANCHOR_SLOTS, self._slot_capacity, {})
        self._n6_down = _Pool(Resource.N6_DOWNLINK, self._n6_downlink_capacity, {})
        self._n6_up = _Pool(Resource.N6_UPLINK, self._n6_uplink_capacity, {})
        self._cell_down = _Pool(Resource.CELL_DOWNLINK, self._cell_downlink_capacity, {})
        self._cell_up = _Pool(Resource.CELL_UPLINK, self._cell_uplink_capacity, {})
        self._pools = {
            pool.resource: pool
            for pool in (self._slots, self._n6_down, self._n6_up, self._cell_down, self._cell_up)
        }
        self._session_of: dict[str, str] = {}  # by lease id
        self._demands: dict[str, dict[str, Demand]] = {}  # by session id, then lease id

    def slots_used(self) -> Mapping[str, int]:
        """Slots reserved, by anchor; a live view. Anchors without a lease may be missing."""
        return self._slots.used

    def used(self, resource: Resource, where: str) -> int:
        """Return what is reserved of a resource at an anchor or in a cell: slots or bit/s."""
        return self._pools[resource].used.get(where, 0)

    def capacity(self, resource: Resource, where: str) -> int | None:
        """Return what there is of a resource at an anchor or in a cell; None: unlimited."""
        return self._pools[resource].capacity(where)

    def shortage(self, session_id: str, demand: Demand) -> Shortage | None:
        """Return what keeps a further lease of a session from being reserved; None if it fits."""
        return _shortage(self._parts(session_id, demand))

    def try_reserve(self, lease_id: str, session_id: str, demand: Demand) -> Shortage | None:
        """Reserve all that a new lease demands. If that is not possible reserve nothing, say why.

        Raises ValueError if the lease holds something already.
        """
        if lease_id in self._session_of:
            raise ValueError(f"lease {lease_id} has been reserved already")
        parts = self._parts(session_id, demand)
        short = _shortage(parts)
        if short is None:
            self._take(lease_id, session_id, demand, parts)
        return short

    def hold(self, lease_id: str, session_id: str, demand: Demand) -> None:
        """Count a lease that is journalled, whether it fits or not; once only."""
        if lease_id not in self._session_of:
            self._take(lease_id, session_id, demand, self._parts(session_id, demand))

    def release(self, lease_id: str) -> None:
        """Give back what a lease holds; nothing if it holds nothing (any more)."""
        session_id = self._session_of.pop(lease_id, None)
        if session_id is None:
            return
        demands = self._demands[session_id]
        demand = demands.pop(lease_id)
        if not demands:
            del self._demands[session_id]
        # What it would add to the session's other leases is what they do not need.
        for pool, where, amount in self._parts(session_id, demand):
            pool.used[where] -= amount

    def move_cell(self, session_id: str, cell: str) -> None:
        """Count a session's leases in the cell that its UE is in now, whether they fit or not.

        Handover admission is the caller's: before this, ask `shortage` (and `victims`) with the
        session's demand in the new cell and no anchor.
        """
        demands = dict(self._demands.get(session_id, {}))
        for lease_id in demands:
            self.release(lease_id)
        for lease_id, demand in demands.items():
            self.hold(lease_id, session_id, replace(demand, cell=cell))

    def victims(
        self, demand: Demand, session_id: str, priority_level: int, holders: Iterable[Holder]
    ) -> list[str] | None:
        """Return the leases to end, among `holders`, so that a demand of a session fits.

        For a session that may pre-empt (its ARP's pre-emption capability) at this priority level.
        Victims are less important than that, vulnerable, and of other sessions; the least
        important come first, of those the ones that free most, and none could be spared. Empty: it
        fits as things are. None: it cannot be made to fit, so nobody is to be taken.
        """
        short = [
            (pool, where, pool.short_by(where, more))
            for pool, where, more in self._parts(session_id, demand)
            if more and pool.short_by(where, more) > 0
        ]
        ranked = []
        for holder in holders:
            held = self._demands.get(holder.session_id, _NONE).get(holder.lease_id)
            if (
                held is not None
                and holder.session_id != session_id
                and holder.vulnerable
                and holder.priority_level > priority_level
                and (relief_ppm := _relief_ppm(held, short))
            ):
                ranked.append((-holder.priority_level, -relief_ppm, holder.lease_id))
        return self._fewest(session_id, demand, [lease_id for *_, lease_id in sorted(ranked)])

    def _fewest(self, session_id: str, demand: Demand, candidates: list[str]) -> list[str] | None:
        """Release candidates until the demand fits, spare whom that allows, put all back."""
        ended: dict[str, tuple[str, Demand]] = {}
        victims: list[str] = []
        for lease_id in candidates:
            if self.shortage(session_id, demand) is None:
                break
            session_of = self._session_of[lease_id]
            ended[lease_id] = session_of, self._demands[session_of][lease_id]
            self.release(lease_id)
        fits = self.shortage(session_id, demand) is None
        for lease_id in reversed(ended):
            self.hold(lease_id, *ended[lease_id])
            if fits and self.shortage(session_id, demand) is not None:
                self.release(lease_id)
                victims.append(lease_id)
        victims.reverse()
        for lease_id in victims:
            self.hold(lease_id, *ended[lease_id])
        return victims if fits else None

    def _parts(self, session_id: str, demand: Demand) -> list[_Part]:
        """Return what a lease adds to what the session's other leases hold."""
        parts: list[_Part] = []
        downlink_bps, uplink_bps = demand.downlink_bps, demand.uplink_bps
        anchor, cell = demand.anchor, demand.cell
        if anchor is not None:
            parts.append((self._slots, anchor, 1))
            parts.append((self._n6_down, anchor, downlink_bps))
            parts.append((self._n6_up, anchor, uplink_bps))
        if cell is not None:
            held_down = held_up = 0
            for other in self._demands.get(session_id, _NONE).values():
                if other.cell == cell:
                    held_down = max(held_down, other.downlink_bps)
                    held_up = max(held_up, other.uplink_bps)
            parts.append((self._cell_down, cell, max(0, downlink_bps - held_down)))
            parts.append((self._cell_up, cell, max(0, uplink_bps - held_up)))
        return parts

    def _take(self, lease_id: str, session_id: str, demand: Demand, parts: list[_Part]) -> None:
        for pool, where, amount in parts:
            pool.used[where] = pool.used.get(where, 0) + amount
        self._session_of[lease_id] = session_id
        self._demands.setdefault(session_id, {})[lease_id] = demand

    def _slot_capacity(self, name: str) -> int:
        anchor = self._anchors.get(name)
        return 0 if anchor is None else anchor.slots

    def _n6_downlink_capacity(self, name: str) -> int | None:
        anchor = self._anchors.get(name)
        return 0 if anchor is None else anchor.n6_downlink_bps

    def _n6_uplink_capacity(self, name: str) -> int | None:
        anchor = self._anchors.get(name)
        return 0 if anchor is None else anchor.n6_uplink_bps

    def _cell_downlink_capacity(self, name: str) -> int | None:
        cell = self._cells.get(name)
        return 0 if cell is None else cell.downlink_bps

    def _cell_uplink_capacity(self, name: str) -> int | None:
        cell = self._cells.get(name)
        return 0 if cell is None else cell.uplink_bps


_NONE: dict[str, Demand] = {}


def _shortage(parts: list[_Part]) -> Shortage | None:
    for pool, where, more in parts:
        if more and (by := pool.short_by(where, more)) > 0:
            return Shortage(pool.resource, where, more, max(0, more - by))
    return None


def _relief_ppm(held: Demand, short: list[_Part]) -> int:
    """How much of what is short this could free at most; summed over what is short."""
    amounts = {
        Resource.ANCHOR_SLOTS: (held.anchor, 1),
        Resource.N6_DOWNLINK: (held.anchor, held.downlink_bps),
        Resource.N6_UPLINK: (held.anchor, held.uplink_bps),
        Resource.CELL_DOWNLINK: (held.cell, held.downlink_bps),
        Resource.CELL_UPLINK: (held.cell, held.uplink_bps),
    }
    relief_ppm = 0
    for pool, where, need in short:
        at, amount = amounts[pool.resource]
        if at == where:
            relief_ppm += min(amount, need) * 1_000_000 // need
    return relief_ppm
