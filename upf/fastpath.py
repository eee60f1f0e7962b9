"""The fast path: what a lease lets through is forwarded where it comes in, past the IP stack.

Programs at tc ingress of the N3 and N6 interfaces (`bpf/fastpath.bpf.c`), and their maps:

    n3   whole datagram --> up: live lease?  its UE may come by here: out to the anchor
    n6   whole datagram --> down: live lease?  ues: where is its UE?  class, DSCP, out to it

They only ever forward what the gate (`upf.schema`) would let through: an entry is there only while
the gate has its lease, and has a deadline of its own, checked for every packet, which is before the
gate's. What else comes, or looks in any way unusual (not UDP, fragments, IP options, extension
headers, a time to live that ends here, VLAN tags, more than the least MTU), goes to the gate as if
this were not there, and the gate decides, drops and counts. Others' rules in the router's forward
hook do not see what goes this way.
"""

import logging
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Self

from pyroute2 import IPRoute

from upf import ingress, libbpf
from upf.config import GateConfig
from upf.elements import Counters
from upf.libbpf import BpfError, Map, NoLibraryError, Program
from upf.netns import in_namespace
from upf.tables import FAMILIES
from upf.timed import ElementName, Wanted

log = logging.getLogger(__name__)

PROGRAM = Path(__file__).with_name("bpf") / "fastpath.bpf.o"
N3, N6 = "aipaging_n3", "aipaging_n6"  # the programs
UP, DOWN = "up", "down"  # the maps of leases, by family: up4, ...
UES, ACCESS, CONSTANTS = "ues", "access", "fastpath.rodata"
ETHERNET = 1  # ARPHRD_ETHER
# How much before its lease an entry ends. The gate ends a lease some milliseconds early, to ticks
# of the kernel's clock (10 ms at most); it is to have the last word, and the last count.
EARLIER_NS = 25_000_000

# As in bpf/fastpath.bpf.c.
_LEASE = struct.Struct("=QQQQ")  # until_ns, packets, bytes, tag
_TO = struct.Struct("=III4s")  # ue, class_id, dscp, device; then a neighbour's address
_HOP = struct.Struct("=I16s")
_SETTINGS = struct.Struct("=III16s")
NUMBER = struct.Struct("=I")
_PAIR = struct.Struct("=II")  # UE, interface
UPLINK = NUMBER.pack(0)  # in the place of an interface, in keys
NO_COUNTS = Counters(0, 0)


class FastPathError(Exception):
    """There can be no fast path here. The message says why."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The user plane's interfaces as the kernel knows them, by name."""

    index: Mapping[str, int]
    mtu_bytes: Mapping[str, int]
    ethernet: bool  # all of them


class Entry(NamedTuple):
    """What a lease's entry says now."""

    until_ns: int
    packets: int
    bytes: int
    tag: int


def ports(netns_path: str, config: GateConfig) -> Ports:
    """Look the interfaces of N3 and N6 up. Raises FastPathError if one is missing."""
    wanted = dict.fromkeys((*config.n3_interfaces, *n6_interfaces(config)))
    found = {link.get_attr("IFLA_IFNAME"): link for link in in_namespace(netns_path, _links)}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise FastPathError(f"there is no interface {', '.join(missing)}")
    return Ports(
        index={name: int(found[name]["index"]) for name in wanted},
        mtu_bytes={name: int(found[name].get_attr("IFLA_MTU")) for name in wanted},
        ethernet=all(found[name]["ifi_type"] == ETHERNET for name in wanted),
    )


def _links() -> list[Any]:
    with IPRoute() as routes:
        return list(routes.get_links())


def unfit(config: GateConfig, there: Ports) -> str:
    """Return why the programs cannot serve these interfaces; empty: they can."""
    n3, n6 = set(config.n3_interfaces), set(n6_interfaces(config))
    if not n3 or not n6:
        return "it needs an interface of N3 and one of N6"
    if n3 & n6:
        return f"{', '.join(sorted(n3 & n6))} is of N3 and of N6"
    return "" if there.ethernet else "an interface of N3 or N6 is not Ethernet"


def n6_interfaces(config: GateConfig) -> tuple[str, ...]:
    """Return the interfaces towards anchors, each once."""
    return tuple(dict.fromkeys(anchor.interface for anchor in config.anchors))


def ue_numbers(config: GateConfig) -> dict[bytes, int]:
    """Return the numbers by which the fast path knows the UEs, by their packed address."""
    ues = dict.fromkeys(place.address.packed for place in config.attachments)
    return {ue: number for number, ue in enumerate(ues)}


@lru_cache(maxsize=4_096)
def tag_of(comment: bytes) -> int:
    """Return by what an entry tells its lease, given the comment of the lease's elements."""
    return int.from_bytes(blake2b(comment, digest_size=8).digest())


@lru_cache(maxsize=4_096)
def encode_down(ue: int, class_id: int, dscp: int) -> bytes:
    """Return the data of a downlink entry: its UE, and what its packets get."""
    return _TO.pack(ue, class_id, dscp, bytes(4))


@lru_cache(maxsize=4_096)
def encode_up(ue: int, device: bytes, neighbour: bytes) -> bytes:
    """Return the data of an uplink entry: its UE, and where its packets go."""
    return _TO.pack(ue, 0, 0, device) + neighbour


def encode_hop(device: int, neighbour: bytes) -> bytes:
    """Return what `ues` says of a UE: an interface (0: no way there), and whom to hand to."""
    return _HOP.pack(device, neighbour)


class EntryChange:
    """A change of leases' entries around one of the gate: what ends went before it."""

    def __init__(self, fast_path: "FastPath") -> None:
        self._fast_path = fast_path
        self.taken: dict[ElementName, tuple[Wanted, Counters]] = {}
        self.opening: list[tuple[Wanted, Counters]] = []

    def complete(self) -> None:
        """The gate has changed: let what begins, or goes on, begin."""
        for wanted, counters in self.opening:
            self._fast_path.put(wanted, counters)

    def undo(self) -> None:
        """The gate has not changed: put back what was taken."""
        for wanted, counters in self.taken.values():
            self._fast_path.put(wanted, counters)


class FastPath:
    """The programs and maps of one user plane, attached in a network namespace."""

    def __init__(self, maps: dict[str, Map]) -> None:
        """Take over open maps."""
        self._maps = maps
        self.ues = maps[UES]
        self._full = False

    @classmethod
    def make(cls, netns_path: str, config: GateConfig, there: Ports, fingerprint: str) -> Self:
        """Load the programs and attach them; others of ours were removed before.

        Raises FastPathError: they were not built, or the kernel refuses them.
        """
        if not PROGRAM.exists():
            raise FastPathError(f"{PROGRAM} was not built: run scripts/setup")
        numbers = ue_numbers(config)
        places = {
            (numbers[place.address.packed], there.index[place.interface])
            for place in config.attachments
        }
        n3, n6 = config.n3_interfaces, n6_interfaces(config)
        mtu = there.mtu_bytes
        constants = _SETTINGS.pack(
            config.anywhere,
            min(mtu[name] for name in n6),
            min(mtu[name] for name in n3),
            _digest(fingerprint),
        )
        try:
            with closing(libbpf.Object(PROGRAM)) as found:
                found.size(UES, max(1, len(numbers)))
                found.size(ACCESS, max(1, len(places)))
                found.set_constants(constants)
                found.load()
                programs = {name: found.program(name) for name in (N3, N6)}
                at = {there.index[name]: programs[N3] for name in n3}
                at |= {there.index[name]: programs[N6] for name in n6}
                with ExitStack() as undo:
                    made = cls(_all_maps(programs.values()))
                    undo.callback(made.close)
                    for ue, index in places:
                        made._maps[ACCESS].put(_PAIR.pack(ue, index), NUMBER.pack(1))
                    ingress.attach(netns_path, at)
                    undo.pop_all()
        except BpfError as error:
            raise FastPathError(f"the fast path cannot be loaded: {error}") from error
        return made

    @classmethod
    def adopt(cls, netns_path: str, there: Ports, fingerprint: str) -> Self | None:
        """Open the programs that an earlier process made for the same configuration, if any."""
        wanted = set(there.index.values())
        try:
            with ingress.attached(netns_path, wanted) as found:
                if {index for index, _ in found} != wanted:
                    return None
                adopted = cls(_all_maps(program for _, program in found))
        except (BpfError, KeyError):
            return None
        if adopted._fingerprint() != _digest(fingerprint):
            adopted.close()
            return None
        return adopted

    def close(self) -> None:
        """Let go. Programs and entries stay."""
        for opened in self._maps.values():
            opened.close()

    def begin(self, pairs: Iterable[tuple[list[Wanted], list[Wanted]]]) -> EntryChange:
        """Begin to change entries from what is to what should be, by flow; the gate is next.

        From now on the gate alone carries those that end or change. A lease that keeps its entry
        counts on from where it was.
        """
        change = EntryChange(self)
        for are, after in pairs:
            if not are:
                change.opening += [(wanted, wanted[5] or NO_COUNTS) for wanted in after]
                continue
            before = {is_[:2]: is_ for is_ in are}
            for wanted in after:
                is_ = before.pop(wanted[:2], None)
                if is_ == wanted:
                    continue
                counters = wanted[5] or NO_COUNTS
                if is_ is not None:
                    had = self._take(change, is_)
                    if had is not None and is_[3] == wanted[3]:
                        counters = had
                change.opening.append((wanted, counters))
            for is_ in before.values():
                self._take(change, is_)
        return change

    def _take(self, change: EntryChange, is_: Wanted) -> Counters | None:
        value = self._maps[is_[0]].take(is_[1])
        if value is None:
            return None
        _, packets, octets, _ = _LEASE.unpack_from(value)
        counters = Counters(packets, octets)
        change.taken[is_[:2]] = (is_, counters)
        return counters

    def put(self, wanted: Wanted, counters: Counters) -> None:
        """Set an entry. If there is no room the gate alone carries its flow."""
        name, key, data, comment, until_ns, _ = wanted
        there = self._maps[name]
        value = _LEASE.pack(max(0, until_ns - EARLIER_NS), *counters, tag_of(comment)) + data
        try:
            there.put(key, value.ljust(there.value_bytes, b"\0"))
        except BpfError as error:
            if not self._full:
                self._full = True
                log.warning("the fast path has no room for a lease, which is slower: %s", error)

    def get(self, name: ElementName) -> Entry | None:
        """Return an entry; None if there is none."""
        value = self._maps[name[0]].get(name[1])
        return None if value is None else Entry(*_LEASE.unpack_from(value))

    def entries(self, name: str) -> Iterator[tuple[bytes, Entry]]:
        """Read all entries of a map."""
        for key, value in self._maps[name].items():
            yield key, Entry(*_LEASE.unpack_from(value))

    def settle(self, wanted: Iterable[Wanted]) -> None:
        """Delete what an earlier process left, but for these entries; set those that are missing.

        A hold of that process, for one, has taken an entry, and is forgotten.
        """
        missing = {one[:2]: one for one in wanted}
        for each in FAMILIES:
            for name in (each.name(UP), each.name(DOWN)):
                for key in [key for key, _ in self.entries(name)]:
                    if missing.pop((name, key), None) is None:
                        self._maps[name].take(key)
        for one in missing.values():
            self.put(one, NO_COUNTS)

    def _fingerprint(self) -> bytes:
        value = self._maps[CONSTANTS].get(NUMBER.pack(0))
        return b"" if value is None else bytes(_SETTINGS.unpack(value)[3])


def remove(netns_path: str) -> None:
    """Take the programs away, if they are there; their maps go with them."""
    with suppress(NoLibraryError):  # then none was loaded either
        ingress.detach(netns_path)


def _all_maps(programs: Iterable[Program]) -> dict[str, Map]:
    maps: dict[str, Map] = {}
    for program in programs:
        for name, found in program.maps().items():
            if name in maps:
                found.close()
            else:
                maps[name] = found
    return maps


def _digest(fingerprint: str) -> bytes:
    """Return what tells the programs of one version and configuration."""
    version = PROGRAM.read_bytes() if PROGRAM.exists() else b""
    return blake2b(fingerprint.encode() + version, digest_size=16).digest()
