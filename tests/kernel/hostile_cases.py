"""What hostile hosts send, one line a case: who sends what, and which counter must tell of it.

UE 1 has a lease to anchor `a`; UE 2 and anchor `b` have none. The router obeys source routes and
segment routing headers, which most do not. To add a case, add a line to CASES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plane import ANCHOR, PORT, SERVICE, UE
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_Redirect,
    ICMPv6NDOptDstLLAddr,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    IPv6ExtHdrSegmentRouting,
    Jumbo,
    RouterAlert,
)
from scapy.layers.l2 import ARP, GRE, Dot1Q, Ether
from scapy.packet import Packet, Raw

UPLINK, DOWNLINK = "no_lease_uplink", "no_lease_downlink"
SPOOFED, DIRECT, SOURCE_ROUTED = "spoofed_source", "direct_to_anchor", "source_routed"
NONE: dict[str, int] = {}  # what the kernel drops without a word


def marked(number: int) -> bytes:
    """Return what the payload of a case's packets begins with."""
    return b"hostile-%08d" % number


class Craft:
    """The addresses and packets of one IP version, and the payload that marks one case's."""

    def __init__(self, version: int, number: int) -> None:
        self.version = version
        self.mark = marked(number)
        self.port = 10_000 + number  # no case meets the connections of another
        self.ue1, self.ue2 = UE[version]
        self.service = SERVICE[version]
        self.a, self.b = ANCHOR["a"][version], ANCHOR["b"][version]
        n3, n6 = ("10.46.", "10.47.") if version == 4 else ("fd00:46:", "fd00:47:")
        gateway = ".1" if version == 4 else "::1"
        self.upf_at_ue2, self.upf_at_b = f"{n3}2{gateway}", f"{n6}2{gateway}"
        self.stranger = "192.0.2.1" if version == 4 else "2001:db8::1"
        self.loopback = "127.0.0.1" if version == 4 else "::1"
        self.multicast = "224.0.0.1" if version == 4 else "ff02::1"
        self.unspecified = "0.0.0.0" if version == 4 else "::"

    def ip(self, src: str = "", dst: str = "", **fields: Any) -> Packet:
        """Return a header; from UE 2 to the service if not told otherwise."""
        kind = IP if self.version == 4 else IPv6
        return kind(src=src or self.ue2, dst=dst or self.service, **fields)

    def udp(self, src: str = "", dst: str = "", **fields: Any) -> Packet:
        """Return a marked datagram."""
        return self.ip(src, dst, **fields) / self.datagram()

    def datagram(self, **fields: Any) -> Packet:
        return UDP(sport=self.port, dport=PORT, **fields) / Raw(self.mark)

    def tcp(self, flags: str, src: str = "", dst: str = "") -> Packet:
        """Return a marked segment."""
        segment = TCP(sport=self.port, dport=PORT, flags=flags, seq=1, ack=1)
        return self.ip(src, dst) / segment / Raw(self.mark)

    def ttl(self, hops: int) -> dict[str, int]:
        return {"ttl" if self.version == 4 else "hlim": hops}

    def echo(self, src: str = "", dst: str = "") -> Packet:
        kind = ICMP() if self.version == 4 else ICMPv6EchoRequest()
        return self.ip(src, dst) / kind / Raw(self.mark)

    def fragments(self, src: str = "", octets: int = 64) -> list[Packet]:
        """Return a datagram in fragments of 32 bytes, each of them marked."""
        payload = self.mark + bytes(8) + (self.mark + bytes(16)) * (octets // 32 - 1)
        datagram = bytes(UDP(sport=self.port, dport=PORT) / Raw(payload))
        return [
            self.piece(datagram[start : start + 32], start, start + 32 < octets, src, self.port)
            for start in range(0, octets, 32)
        ]

    def piece(self, data: bytes, start: int, more: bool, src: str, number: int) -> Packet:
        """Return one fragment; `start` in bytes."""
        if self.version == 4:
            flags = "MF" if more else 0
            return self.ip(src, id=number, flags=flags, frag=start // 8, proto=17) / Raw(data)
        header = IPv6ExtHdrFragment(nh=17, offset=start // 8, m=int(more), id=number)
        return self.ip(src) / header / Raw(data)

    def error(self, src: str = "", dst: str = "", *, about: Packet) -> Packet:
        """Return an ICMP error about a packet that its receiver is said to have sent."""
        if self.version == 4:
            return self.ip(src, dst) / ICMP(type=3, code=3) / Raw(bytes(about))
        return self.ip(src, dst) / ICMPv6DestUnreach(code=4) / Raw(bytes(about))

    def too_big(self, src: str, dst: str, *, about: Packet) -> Packet:
        """Return an ICMP error that says that no more than the least MTU passes."""
        if self.version == 4:
            return self.ip(src, dst) / ICMP(type=3, code=4, nexthopmtu=576) / Raw(bytes(about))
        return self.ip(src, dst) / ICMPv6PacketTooBig(mtu=1280) / Raw(bytes(about))


@dataclass(frozen=True)
class Case:
    """What one host sends, in each IP version that makes sense."""

    sender: str  # "ue1", "ue2", "a", "b"
    name: str
    frames: Callable[[Craft], Packet | list[Packet]]  # IP packets, or whole Ethernet frames
    # The reason of `drops()` that counts each of them, or how many each counter must rise by: a
    # reason, or (with a dot) of the kernel's own MIB.
    counted: str | dict[str, int]
    plain_router: str = "a"  # who gets it where there is no gate; "" if nobody does
    versions: tuple[int, ...] = (4, 6)
    covered_by: str = ""  # the anchor that gets it (may get it, if no plain router passes it on)

    def packets(self, craft: Craft) -> list[Packet]:
        made = self.frames(craft)
        return made if isinstance(made, list) else [made]

    def covered(self, got: set[str]) -> set[str]:
        """Return who may get it, and has to; `got` if that is nobody and it may be so."""
        return got & {self.covered_by} if not self.plain_router else {self.covered_by} - {""}

    def rises(self, packets: int) -> dict[str, int]:
        """Return by how much each counter must rise."""
        return {self.counted: packets} if isinstance(self.counted, str) else self.counted


V4: dict[str, Any] = {"versions": (4,)}
V6: dict[str, Any] = {"versions": (6,)}
COVERED: dict[str, Any] = {"covered_by": "a"}
VLAN = Ether(type=0x8100)
BAD_HEADER, BAD_HEADER6 = {"Ip.InHdrErrors": 1}, {"Ip6.InHdrErrors": 1}

CASES = (
    # No lease: whatever it is.
    Case("ue2", "a datagram", lambda c: c.udp(), UPLINK),
    Case("ue2", "an echo request", lambda c: c.echo(), UPLINK),
    Case("ue2", "a SYN", lambda c: c.tcp("S"), UPLINK),
    Case("ue2", "an ACK of no connection", lambda c: c.tcp("A"), UPLINK),
    Case("ue2", "a SYN with FIN", lambda c: c.tcp("SF"), UPLINK),
    Case("ue2", "a storm of RST", lambda c: [c.tcp("R")] * 50, UPLINK),
    Case("ue2", "all TCP flags", lambda c: c.tcp("FSRPAUEC"), UPLINK),
    Case("ue2", "no TCP flags", lambda c: c.tcp(""), UPLINK),
    Case("ue2", "a TCP header cut short", lambda c: _proto(c, 6, c.mark), UPLINK),
    Case("ue2", "a TCP header longer than its segment", lambda c: _data_offset(c), UPLINK),
    Case("ue2", "IP in IP", lambda c: c.ip() / c.udp(c.ue1), UPLINK),
    Case("ue2", "GRE", lambda c: c.ip() / GRE() / c.udp(c.ue1), UPLINK),
    Case("ue2", "GTP-U", lambda c: c.ip() / _gtp(c), UPLINK),
    Case("ue2", "ESP", lambda c: _proto(c, 50, bytes(8) + c.mark), UPLINK),
    Case("ue2", "protocol 255", lambda c: _proto(c, 255, c.mark), UPLINK),
    Case("ue2", "an empty datagram for a full one", lambda c: _udp_length(c, 0), UPLINK),
    Case("ue2", "a datagram longer than its packet", lambda c: _udp_length(c, 9_000), UPLINK),
    Case("ue2", "a last hop", lambda c: c.udp(**c.ttl(1)), UPLINK, ""),
    Case("ue2", "a hop too many", lambda c: c.udp(**c.ttl(0)), UPLINK, ""),
    # A lease is its UE's and its service's. What is no connection has none, leased or not.
    Case("ue1", "a datagram", lambda c: c.udp(c.ue1), NONE, **COVERED),
    Case("ue1", "an echo request", lambda c: c.echo(c.ue1), NONE, **COVERED),
    Case("ue1", "GRE", lambda c: c.ip(c.ue1) / GRE() / c.udp(c.ue2), NONE, **COVERED),
    Case("ue1", "IP in IP", lambda c: c.ip(c.ue1) / c.udp(c.ue2), NONE, **COVERED),
    Case("ue1", "GTP-U", lambda c: c.ip(c.ue1) / _gtp(c), NONE, **COVERED),
    Case("ue1", "a SYN", lambda c: c.tcp("S", c.ue1), NONE, **COVERED),
    Case("ue1", "a SYN with FIN", lambda c: c.tcp("SF", c.ue1), UPLINK),
    Case("ue1", "no TCP flags", lambda c: c.tcp("", c.ue1), UPLINK),
    Case("ue1", "a last hop", lambda c: c.udp(c.ue1, **c.ttl(1)), NONE, ""),
    Case("ue1", "a hop too many", lambda c: c.udp(c.ue1, **c.ttl(0)), NONE, ""),
    Case("ue1", "past the service, to its anchor", lambda c: c.udp(c.ue1, c.a), DIRECT),
    Case("ue1", "to a service of nobody", lambda c: c.udp(c.ue1, _next(c.service)), UPLINK, "b"),
    Case("ue1", "an ACK of no connection", lambda c: c.tcp("A", c.ue1), UPLINK),
    Case("ue1", "an RST of no connection", lambda c: c.tcp("R", c.ue1), UPLINK),
    # Another's source, from N3.
    Case("ue2", "as a UE with a lease", lambda c: c.udp(c.ue1), SPOOFED),
    Case("ue2", "as a UE with a lease, TCP", lambda c: c.tcp("S", c.ue1), SPOOFED),
    Case("ue2", "as the service", lambda c: c.udp(c.service, c.ue1), DOWNLINK, "ue1"),
    Case("ue2", "as the service, TCP", lambda c: c.tcp("SA", c.service, c.ue1), DOWNLINK, "ue1"),
    Case("ue2", "as the service, to it", lambda c: c.udp(c.service), SPOOFED),
    Case("ue2", "as the service, to the UPF", lambda c: c.udp(c.service, c.upf_at_ue2), DOWNLINK,
         "upf"),
    Case("ue2", "as an anchor", lambda c: c.udp(c.a), SPOOFED),
    Case("ue2", "as an anchor, to a UE", lambda c: c.udp(c.a, c.ue1), SPOOFED, "ue1"),
    Case("ue2", "as an anchor, to an anchor", lambda c: c.udp(c.b, c.a), DIRECT),
    Case("ue2", "as an anchor, to the UPF", lambda c: c.udp(c.a, c.upf_at_ue2), SPOOFED, "upf"),
    Case("ue2", "as another UE, to the UPF", lambda c: c.udp(c.ue1, c.upf_at_ue2), SPOOFED,
         "upf"),
    Case("ue2", "as another UE, to it", lambda c: c.udp(c.ue1, c.ue1), SPOOFED, "ue1"),
    Case("ue2", "as another UE, dying on the way: its error would be to the other",
         lambda c: c.udp(c.ue1, c.a, **c.ttl(1)), DIRECT, "ue1"),
    Case("ue2", "as another UE, dying on the way to nowhere",
         lambda c: c.udp(c.ue1, c.stranger, **c.ttl(1)), SPOOFED, "ue1"),
    Case("ue2", "as a stranger", lambda c: c.udp(c.stranger), SPOOFED),
    Case("ue2", "as a stranger, to a UE", lambda c: c.udp(c.stranger, c.ue1), SPOOFED, "ue1"),
    Case("ue2", "as the UPF", lambda c: c.udp(c.upf_at_ue2), SPOOFED, "", **V4),
    Case("ue2", "as the UPF", lambda c: c.udp(c.upf_at_ue2), SPOOFED, **V6),
    Case("ue2", "as the loopback", lambda c: c.udp(c.loopback), SPOOFED, "", **V4),
    Case("ue2", "as the loopback", lambda c: c.udp(c.loopback), NONE, "", **V6),
    Case("ue2", "as a multicast group", lambda c: c.udp(c.multicast), SPOOFED, "", **V4),
    Case("ue2", "as a multicast group", lambda c: c.udp(c.multicast), BAD_HEADER6, "", **V6),
    Case("ue2", "as nobody", lambda c: c.udp(c.unspecified), SPOOFED, ""),
    # And from N6.
    Case("b", "as the service, without a lease", lambda c: c.udp(c.service, c.ue1), DOWNLINK,
         "ue1"),
    Case("b", "as the service, without a lease, TCP", lambda c: c.tcp("SA", c.service, c.ue1),
         DOWNLINK, "ue1"),
    Case("b", "as itself, to a UE", lambda c: c.udp(c.b, c.ue1), DOWNLINK, "ue1"),
    Case("b", "as a UE, to a UE", lambda c: c.udp(c.ue2, c.ue1), DOWNLINK, "ue1"),
    Case("b", "as a UE, to the service", lambda c: c.udp(c.ue1), SPOOFED),
    Case("b", "as a UE, to an anchor", lambda c: c.udp(c.ue1, c.a), SPOOFED),
    Case("b", "as a UE, to the UPF", lambda c: c.udp(c.ue1, c.upf_at_b), SPOOFED, "upf"),
    Case("b", "as another anchor, to the UPF", lambda c: c.udp(c.a, c.upf_at_b), SPOOFED,
         "upf"),
    Case("b", "as the leased anchor, to the UE", lambda c: c.udp(c.a, c.ue1), DOWNLINK, "ue1"),
    Case("b", "as the UPF, to the UE", lambda c: c.udp(c.upf_at_b, c.ue1), DOWNLINK, "", **V4),
    Case("b", "as the UPF, to the UE", lambda c: c.udp(c.upf_at_b, c.ue1), DOWNLINK, "ue1", **V6),
    Case("b", "an echo request to the UE", lambda c: c.echo(c.b, c.ue1), DOWNLINK, "ue1"),
    Case("a", "as a service of nobody", lambda c: c.udp(_next(c.service), c.ue1), DOWNLINK,
         "ue1"),
    Case("a", "to a UE without a lease", lambda c: c.udp(c.service, c.ue2), DOWNLINK, "ue2"),
    Case("a", "an answer of no connection", lambda c: c.tcp("SA", c.service, c.ue1), DOWNLINK,
         "ue1"),
    # Fragments. Those that do not make a whole wait in the kernel for the rest.
    Case("ue2", "all fragments", lambda c: c.fragments(), {UPLINK: 1}),
    Case("ue1", "all fragments", lambda c: c.fragments(c.ue1), NONE, **COVERED),
    Case("ue2", "as the UE with a lease, fragments", lambda c: c.fragments(c.ue1), {SPOOFED: 1}),
    Case("ue2", "the first fragment", lambda c: c.fragments()[:1], NONE),
    Case("ue2", "the last fragment", lambda c: c.fragments()[1:], NONE),
    Case("ue2", "a fragment from the middle", lambda c: c.fragments(octets=96)[1:2], NONE),
    Case("ue2", "overlapping fragments", lambda c: _overlapping(c), NONE),
    Case("ue1", "overlapping fragments", lambda c: _overlapping(c, c.ue1), NONE),
    Case("ue2", "a tiny first fragment of TCP", lambda c: _tiny(c), {UPLINK: 1}),
    Case("ue2", "a fragment beyond 64 KiB", lambda c: c.piece(c.mark, 65_528, False, "", c.port),
         NONE, **V4),
    Case("ue2", "a lone fragment", lambda c: c.piece(bytes(c.datagram()), 0, False, "", c.port),
         UPLINK, **V6),
    # IPv4 headers
    Case("ue2", "a header shorter than a header", lambda c: c.udp(ihl=4), BAD_HEADER, "", **V4),
    Case("ue2", "a header longer than the packet", lambda c: _cut(c.udp(ihl=15), 40),
         BAD_HEADER, "", **V4),
    Case("ue2", "version 5", lambda c: _poke(c.udp(), 0, 0x55), BAD_HEADER, "", **V4),
    Case("ue2", "a packet longer than its frame", lambda c: c.udp(len=1_400),
         {"IpExt.InTruncatedPkts": 1}, "", **V4),
    Case("ue2", "a length shorter than the header", lambda c: c.udp(len=12), BAD_HEADER, "", **V4),
    Case("ue2", "a bad header checksum", lambda c: c.udp(chksum=1), {"IpExt.InCsumErrors": 1}, "",
         **V4),
    # No rule can verify these. The IP stack discards them; what is forwarded past it stays bad,
    # and goes where its lease leads.
    Case("ue1", "a bad header checksum", lambda c: c.udp(c.ue1, chksum=1), NONE, "", **COVERED,
         **V4),
    Case("ue1", "a packet longer than its frame", lambda c: c.udp(c.ue1, len=1_400), NONE, "",
         **COVERED, **V4),
    Case("ue1", "a packet longer than its frame", lambda c: c.udp(c.ue1, plen=1_400), NONE, "",
         **COVERED, **V6),
    Case("ue1", "a length shorter than the header", lambda c: c.udp(c.ue1, len=12), NONE, "",
         **COVERED, **V4),
    Case("ue1", "version 5", lambda c: _poke(c.udp(c.ue1), 0, 0x55), BAD_HEADER, "", **V4),
    Case("ue1", "the other version's frame",
         lambda c: Ether(type=0x0800 if c.version == 6 else 0x86DD) / Raw(bytes(c.udp(c.ue1))),
         NONE, ""),
    Case("ue1", "a header longer than the packet", lambda c: _cut(c.udp(c.ue1, ihl=15), 40),
         BAD_HEADER, "", **V4),
    Case("ue1", "a bad UDP checksum", lambda c: c.ip(c.ue1) / c.datagram(chksum=1), NONE,
         **COVERED),
    Case("ue1", "a bad TCP checksum", lambda c: _tcp_checksum(c), UPLINK),
    Case("ue2", "options", lambda c: c.udp(options=[Raw(b"\x07\x07\x04\0\0\0\0\0")]), UPLINK,
         **V4),
    Case("ue1", "a bad option", lambda c: c.udp(c.ue1, options=[Raw(b"\x07\x27\x04\0")]),
         BAD_HEADER, "", **V4),
    Case("ue2", "a source route through the UPF to an anchor",
         lambda c: _source_route(c, c.upf_at_ue2, c.a), SOURCE_ROUTED, **V4),
    Case("ue2", "a source route through the UPF to the service",
         lambda c: _source_route(c, c.upf_at_ue2, c.service), SOURCE_ROUTED, **V4),
    Case("ue1", "a source route by the service to an anchor",
         lambda c: _source_route(c, c.service, c.b, c.ue1), NONE, **COVERED, **V4),
    Case("b", "a source route through the UPF to a UE",
         lambda c: _source_route(c, c.upf_at_b, c.ue1, c.b), SOURCE_ROUTED, "ue1",
         **V4),
    # IPv6 headers
    Case("ue2", "hop-by-hop options", lambda c: c.ip() / _hop_by_hop() / c.datagram(), UPLINK,
         **V6),
    Case("ue2", "destination options",
         lambda c: c.ip() / IPv6ExtHdrDestOpt() / c.datagram(), UPLINK, **V6),
    Case("ue1", "destination options", lambda c: c.ip(c.ue1) / IPv6ExtHdrDestOpt() / c.datagram(),
         NONE, **COVERED, **V6),
    Case("ue2", "as the UE with a lease, destination options",
         lambda c: c.ip(c.ue1) / IPv6ExtHdrDestOpt() / c.datagram(), SPOOFED, **V6),
    Case("ue2", "TCP behind destination options",
         lambda c: c.ip() / IPv6ExtHdrDestOpt() / TCP(dport=PORT) / Raw(c.mark), UPLINK, **V6),
    Case("ue1", "TCP of no connection behind destination options",
         lambda c: c.ip(c.ue1) / IPv6ExtHdrDestOpt() / TCP(dport=PORT, flags="A") / Raw(c.mark),
         UPLINK, **V6),
    Case("ue2", "a routing header of type 0 at the UPF",
         lambda c: c.ip(dst=c.upf_at_ue2) / IPv6ExtHdrRouting(addresses=[c.a]) / c.datagram(),
         BAD_HEADER6, "", **V6),
    Case("ue2", "a routing header on the way",
         lambda c: c.ip() / IPv6ExtHdrRouting(addresses=[c.a]) / c.datagram(), UPLINK, **V6),
    Case("ue2", "segments through the UPF to an anchor", lambda c: _segments(c, c.a), DIRECT,
         **V6),
    Case("ue2", "segments through the UPF to the service", lambda c: _segments(c, c.service),
         UPLINK, **V6),
    Case("b", "segments through the UPF to a UE", lambda c: _segments(c, c.ue1, c.b, c.upf_at_b),
         DOWNLINK, "ue1", **V6),
    Case("ue2", "a jumbogram", lambda c: _jumbo(c), NONE, "", **V6),
    Case("ue2", "hop-by-hop options that go on beyond the packet",
         lambda c: _poke(c.ip() / _hop_by_hop() / Raw(c.mark), 41, 255), BAD_HEADER6, "", **V6),
    Case("ue1", "extension headers without an end",
         lambda c: _poke(c.ip(c.ue1) / IPv6ExtHdrDestOpt() / Raw(c.mark), 41, 255), NONE,
         **COVERED, **V6),
    Case("ue1", "TCP beyond extension headers without an end",
         lambda c: _poke(c.ip(c.ue1) / IPv6ExtHdrDestOpt(nh=6) / Raw(c.mark), 41, 255), UPLINK,
         **V6),
    Case("ue2", "a packet longer than its frame", lambda c: c.udp(plen=1_400),
         {"Ip6.InTruncatedPkts": 1}, "", **V6),
    Case("ue2", "no next header", lambda c: c.ip(nh=59) / Raw(c.mark), UPLINK, **V6),
    # ICMP errors, about what was never sent and about what was
    Case("ue2", "an error to the service about the leased UE's packets",
         lambda c: c.error(about=c.udp(c.service, c.ue2)), UPLINK),
    Case("b", "an error to the UE about its packets", lambda c: c.error(c.b, c.ue1,
         about=c.udp(c.ue1)), DOWNLINK, "ue1"),
    Case("b", "an error to the UE about its packets, as the service",
         lambda c: c.error(c.service, c.ue1, about=c.udp(c.ue1)), DOWNLINK, "ue1"),
    Case("b", "an error to the UE about its connections",
         lambda c: c.error(c.b, c.ue1, about=c.tcp("A", c.ue1)), DOWNLINK, "ue1"),
    Case("ue2", "an error to an anchor about its answers",
         lambda c: c.error(dst=c.a, about=c.udp(c.a, c.ue2)), DIRECT),
    Case("ue2", "too big, to the UPF, about the leased UE's packets",
         lambda c: c.too_big(c.ue2, c.upf_at_ue2, about=c.udp(c.ue1)), NONE, ""),
    Case("b", "too big, to the UPF, about the leased UE's packets",
         lambda c: c.too_big(c.b, c.upf_at_b, about=c.udp(c.ue1)), NONE, ""),
    Case("b", "a redirect of the service", lambda c: IP(src=c.b, dst=c.upf_at_b)
         / ICMP(type=5, code=1, gw=c.b) / Raw(bytes(c.udp(c.upf_at_b))), NONE, "", **V4),
    Case("b", "a redirect of the service", lambda c: IPv6(src="fe80::2", dst=c.upf_at_b, hlim=255)
         / ICMPv6ND_Redirect(tgt="fe80::2", dst=c.service) / Raw(c.mark), NONE, "", **V6),
    # Frames
    Case("ue1", "in a VLAN of nobody", lambda c: VLAN / Dot1Q(vlan=5) / c.udp(c.ue1), NONE, ""),
    Case("ue1", "in two VLANs", lambda c: VLAN / Dot1Q(vlan=5) / Dot1Q(vlan=6) / c.udp(c.ue1),
         NONE, ""),
    Case("ue2", "in the VLAN of priority alone", lambda c: VLAN / Dot1Q(vlan=0) / c.udp(), UPLINK),
    Case("ue1", "to another station", lambda c: Ether(dst="02:00:00:00:00:99") / c.udp(c.ue1),
         NONE, ""),
    Case("ue1", "to all stations", lambda c: Ether(dst="ff:ff:ff:ff:ff:ff") / c.udp(c.ue1), NONE,
         ""),
    Case("ue2", "an ARP answer that claims an anchor, the UPF and a UE",
         lambda c: [_arp(address) for address in (c.a, c.upf_at_ue2, c.ue1, "10.46.1.2")], NONE,
         "", **V4),
    Case("ue2", "an advertisement that claims an anchor, the UPF and a UE",
         lambda c: [_advertise(c, address) for address in (c.a, c.upf_at_ue2, "fd00:46:1::2")],
         NONE, "", **V6),
)  # fmt: skip


def _next(address: str) -> str:
    return address[:-1] + "9"


def _proto(craft: Craft, number: int, data: bytes) -> Packet:
    name = "proto" if craft.version == 4 else "nh"
    return craft.ip(**{name: number}) / Raw(data)


def _gtp(craft: Craft) -> Packet:
    inner = bytes(craft.udp(craft.ue1))
    header = bytes([0x30, 0xFF]) + len(inner).to_bytes(2, "big") + bytes(4)
    return UDP(sport=2152, dport=2152) / Raw(header + inner)


def _udp_length(craft: Craft, length: int) -> Packet:
    return craft.ip() / craft.datagram(len=length)


def _data_offset(craft: Craft) -> Packet:
    return craft.ip() / TCP(sport=craft.port, dport=PORT, flags="S", dataofs=15) / Raw(craft.mark)


def _tcp_checksum(craft: Craft) -> Packet:
    segment = TCP(sport=craft.port, dport=PORT, flags="S", chksum=1)
    return craft.ip(craft.ue1) / segment / Raw(craft.mark)


def _overlapping(craft: Craft, src: str = "") -> list[Packet]:
    data = bytes(craft.datagram())
    data += bytes(-len(data) % 8)
    return [
        craft.piece(data[:16], 0, True, src, craft.port),
        craft.piece(data[8:], 8, True, src, craft.port),
        craft.piece(data[16:], 16, False, src, craft.port),
    ]


def _tiny(craft: Craft) -> list[Packet]:
    """Eight bytes of TCP first: ports, but no flags."""
    segment = bytes(TCP(sport=craft.port, dport=PORT, flags="S") / Raw(craft.mark))
    pieces = [
        craft.piece(segment[:8], 0, True, "", craft.port),
        craft.piece(segment[8:], 8, False, "", craft.port),
    ]
    for piece in pieces:
        if craft.version == 4:
            piece.proto = 6
        else:
            piece[IPv6ExtHdrFragment].nh = 6
    return pieces


def _cut(packet: Packet, octets: int) -> Packet:
    return Raw(bytes(packet)[:octets])


def _poke(packet: Packet, offset: int, value: int) -> Packet:
    data = bytearray(bytes(packet))
    data[offset] = value
    return Raw(bytes(data))


def _source_route(craft: Craft, first: str, then: str, src: str = "") -> Packet:
    """Loose source route: to `first`, which sends it on to `then`."""
    hop = bytes(int(part) for part in then.split("."))
    return craft.udp(src, first, options=[Raw(b"\x83\x07\x04" + hop + b"\x00")])


def _hop_by_hop() -> Packet:
    return IPv6ExtHdrHopByHop(options=[RouterAlert()])


def _segments(craft: Craft, last: str, src: str = "", first: str = "") -> Packet:
    route = IPv6ExtHdrSegmentRouting(
        addresses=[last, first or craft.upf_at_ue2], segleft=1, lastentry=1
    )
    return craft.ip(src, first or craft.upf_at_ue2) / route / craft.datagram()


def _jumbo(craft: Craft) -> Packet:
    options = IPv6ExtHdrHopByHop(options=[Jumbo(jumboplen=70_000)])
    return craft.ip(plen=0) / options / craft.datagram()


def _arp(address: str) -> Packet:
    return Ether(dst="ff:ff:ff:ff:ff:ff") / ARP(op=2, psrc=address, pdst=address)


def _advertise(craft: Craft, address: str) -> Packet:
    packet = IPv6(src=craft.ue2, dst=craft.upf_at_ue2, hlim=255)
    option = ICMPv6NDOptDstLLAddr(lladdr="02:00:00:00:00:99")
    return packet / ICMPv6ND_NA(tgt=address, R=0, S=0, O=1) / option
