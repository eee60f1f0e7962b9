"""The address plan: who is who in the emulated network, in both families.

| what                              | IPv4                | IPv6                   |
| --------------------------------- | ------------------- | ---------------------- |
| UE n (survives handover)          | 10.45.0.n/32        | fd00:45::n/128         |
| cell of gNB g: the gNB itself     | 10.46.g.254/24      | fd00:46:g::fe/64       |
| cell of gNB g: UE n               | 10.46.g.n/24        | fd00:46:g::n/64        |
| N6 link of anchor a: UPF, anchor  | 10.47.a.1, .2 /24   | fd00:47:a::1, ::2 /64  |
| N3 link of gNB g: UPF, gNB        | 10.48.g.1, .2 /24   | fd00:48:g::1, ::2 /64  |
| link of the core: UPF, core       | 10.49.0.1, .2 /24   | fd00:49::1, ::2 /64    |

(IPv6 groups are written with the decimal digits of the number: gNB 12 has fd00:46:12::/64.)
"""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

MAX_UES = 250
MAX_GNBS = 16
MAX_ANCHORS = 64


@dataclass(frozen=True, slots=True)
class Pair:
    """One node's addresses on one link, with prefix lengths."""

    v4: IPv4Interface
    v6: IPv6Interface

    @property
    def address4(self) -> IPv4Address:
        """The IPv4 address alone."""
        return self.v4.ip

    @property
    def address6(self) -> IPv6Address:
        """The IPv6 address alone."""
        return self.v6.ip


def _pair(v4: str, v6: str) -> Pair:
    return Pair(IPv4Interface(v4), IPv6Interface(v6))


def ue(number: int) -> Pair:
    """The address of UE `number` (from 1), which it keeps whatever cell it is in."""
    return _pair(f"10.45.0.{number}/32", f"fd00:45::{number:x}/128")


def cell_gnb(gnb: int) -> Pair:
    """A gNB's own address in its cell; gNBs are numbered from 1."""
    return _pair(f"10.46.{gnb}.254/24", f"fd00:46:{gnb}::fe/64")


def cell_ue(gnb: int, number: int) -> Pair:
    """The address of UE `number` in the cell of gNB `gnb`."""
    return _pair(f"10.46.{gnb}.{number}/24", f"fd00:46:{gnb}::{number:x}/64")


def n6_upf(anchor: int) -> Pair:
    """The UPF's end of the link to an anchor; anchors are numbered from 1."""
    return _pair(f"10.47.{anchor}.1/24", f"fd00:47:{anchor}::1/64")


def n6_anchor(anchor: int) -> Pair:
    """An anchor's own address."""
    return _pair(f"10.47.{anchor}.2/24", f"fd00:47:{anchor}::2/64")


def n3_upf(gnb: int) -> Pair:
    """The UPF's end of the N3 link to a gNB."""
    return _pair(f"10.48.{gnb}.1/24", f"fd00:48:{gnb}::1/64")


def n3_gnb(gnb: int) -> Pair:
    """A gNB's end of its N3 link."""
    return _pair(f"10.48.{gnb}.2/24", f"fd00:48:{gnb}::2/64")


def core_upf() -> Pair:
    """The UPF's end of the link to the core."""
    return _pair("10.49.0.1/24", "fd00:49::1/64")


def core() -> Pair:
    """The core host's address."""
    return _pair("10.49.0.2/24", "fd00:49::2/64")


def cell_mac(gnb: int, number: int) -> str:
    """The MAC address of UE `number`'s radio in a cell."""
    return f"02:46:00:{gnb:02x}:00:{number:02x}"


def cell_port_mac(gnb: int, number: int) -> str:
    """The MAC address of the gNB's port towards that radio."""
    return f"02:46:01:{gnb:02x}:00:{number:02x}"


def upf_macs(kind: int, number: int) -> tuple[str, str]:
    """The MAC addresses of the UPF's and the other end of a link: `kind` as in 10.kind.0.0."""
    return f"02:{kind}:00:{number:02x}:00:01", f"02:{kind}:00:{number:02x}:00:02"


def link_local(mac: str) -> IPv6Address:
    """The link-local address the kernel derives from a MAC address (RFC 4291, modified EUI-64)."""
    octets = [int(part, 16) for part in mac.split(":")]
    eui64 = bytes([octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:]])
    return IPv6Address(b"\xfe\x80" + bytes(6) + eui64)
