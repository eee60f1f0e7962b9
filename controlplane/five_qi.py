"""The standardised 5QI values: 3GPP TS 23.501 (Release 18), table 5.7.4-1, as data.

A 5QI names how a QoS flow is forwarded: its resource type, its priority, the delay and loss it can
bear. 5QI 75 of older releases has no characteristics any more and is left out.

`DSCPS` says how packets of a flow are marked on the way (TS 23.501, 5.8.2.7: transport level packet
marking, which leaves the values to the operator). 5QI 1 to 9 are GSMA IR.34's recommendation for
the QCI of the same number. IR.34 knows no others; those get the code point that it, or RFC 4594,
has for their kind of service.
"""

from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from controlplane.enforcement import QosFlow


class ResourceType(StrEnum):
    """Whether a flow's rate is guaranteed (TS 23.501, 5.7.3.2)."""

    GBR = "GBR"
    NON_GBR = "Non-GBR"
    DELAY_CRITICAL_GBR = "Delay-critical GBR"


class Characteristics(NamedTuple):
    """The 5G QoS characteristics of a 5QI (TS 23.501, 5.7.3)."""

    resource_type: ResourceType
    priority_level: int  # default; 1 is served first
    packet_delay_budget_ms: int  # between UE and UPF (N6 termination point)
    packet_error_rate: float  # upper bound
    maximum_data_burst_volume_bytes: int | None  # default; delay-critical GBR only
    averaging_window_ms: int | None  # default; of guaranteed and maximum rates
    example: str

    @property
    def guaranteed(self) -> bool:
        """Whether flows of this 5QI have a guaranteed flow bit rate (GFBR)."""
        return self.resource_type is not ResourceType.NON_GBR


BEST_EFFORT = 9  # what an ordinary default QoS flow has

_GBR, _NON_GBR, _CRITICAL = (
    ResourceType.GBR,
    ResourceType.NON_GBR,
    ResourceType.DELAY_CRITICAL_GBR,
)
_WINDOW_MS = 2_000
_BUFFERED = "video (buffered streaming); TCP-based, such as www, e-mail, chat, ftp"
_LIVE_UPLINK = "live uplink streaming"


def _gbr(priority: int, delay_ms: int, loss: float, example: str) -> Characteristics:
    return Characteristics(_GBR, priority, delay_ms, loss, None, _WINDOW_MS, example)


def _non_gbr(priority: int, delay_ms: int, loss: float, example: str) -> Characteristics:
    return Characteristics(_NON_GBR, priority, delay_ms, loss, None, None, example)


def _critical(
    priority: int, delay_ms: int, loss: float, burst_bytes: int, example: str
) -> Characteristics:
    return Characteristics(_CRITICAL, priority, delay_ms, loss, burst_bytes, _WINDOW_MS, example)


FIVE_QIS: Mapping[int, Characteristics] = MappingProxyType(
    {
        1: _gbr(20, 100, 1e-2, "conversational voice"),
        2: _gbr(40, 150, 1e-3, "conversational video (live streaming)"),
        3: _gbr(30, 50, 1e-3, "real-time gaming, V2X messages, process automation monitoring"),
        4: _gbr(50, 300, 1e-6, "non-conversational video (buffered streaming)"),
        65: _gbr(7, 75, 1e-2, "mission-critical push-to-talk voice"),
        66: _gbr(20, 100, 1e-2, "push-to-talk voice that is not mission-critical"),
        67: _gbr(15, 100, 1e-3, "mission-critical video"),
        71: _gbr(56, 150, 1e-6, _LIVE_UPLINK),
        72: _gbr(56, 300, 1e-4, _LIVE_UPLINK),
        73: _gbr(56, 300, 1e-8, _LIVE_UPLINK),
        74: _gbr(56, 500, 1e-8, _LIVE_UPLINK),
        76: _gbr(56, 500, 1e-4, _LIVE_UPLINK),
        5: _non_gbr(10, 100, 1e-6, "IMS signalling"),
        6: _non_gbr(60, 300, 1e-6, _BUFFERED),
        7: _non_gbr(70, 100, 1e-3, "voice, video (live streaming), interactive gaming"),
        8: _non_gbr(80, 300, 1e-6, _BUFFERED),
        9: _non_gbr(90, 300, 1e-6, _BUFFERED),
        10: _non_gbr(90, 1_100, 1e-6, f"{_BUFFERED}; over satellites"),
        69: _non_gbr(5, 60, 1e-6, "mission-critical delay-sensitive signalling"),
        70: _non_gbr(55, 200, 1e-6, "mission-critical data"),
        79: _non_gbr(65, 50, 1e-2, "V2X messages"),
        80: _non_gbr(68, 10, 1e-6, "low-latency eMBB, augmented reality"),
        82: _critical(19, 10, 1e-4, 255, "discrete automation"),
        83: _critical(22, 10, 1e-4, 1_354, "discrete automation, V2X platooning"),
        84: _critical(24, 30, 1e-5, 1_354, "intelligent transport systems"),
        85: _critical(21, 5, 1e-5, 255, "high-voltage distribution, remote driving"),
        86: _critical(18, 5, 1e-4, 1_354, "V2X collision avoidance"),
        87: _critical(25, 5, 1e-3, 500, "interactive service: motion tracking"),
        88: _critical(25, 10, 1e-3, 1_125, "interactive service: motion tracking; split inference"),
        89: _critical(25, 15, 1e-4, 17_000, "rendering in cloud or edge, or split: pictures"),
        90: _critical(25, 20, 1e-4, 63_000, "rendering in cloud or edge, or split: pictures"),
    }
)

_EF, _AF41, _AF31, _AF32, _AF21, _AF11, _CS5 = 46, 34, 26, 28, 18, 10, 40

# 6 bits; a 5QI that is not here is not marked.
DSCPS: Mapping[int, int] = MappingProxyType(
    {
        # GSMA IR.34, recommended mapping of QCI to DiffServ
        **dict.fromkeys((1, 2, 3), _EF),
        **{4: _AF41, 5: _AF31, 6: _AF32, 7: _AF21, 8: _AF11},
        # voice and what is as urgent (RFC 4594, 4.1)
        **dict.fromkeys((65, 66, 82, 83, 84, 85, 86, 87, 88), _EF),
        # video (as QCI 4; RFC 4594, 4.3)
        **dict.fromkeys((67, 71, 72, 73, 74, 76, 89, 90), _AF41),
        # signalling (RFC 4594, 4.2)
        69: _CS5,
        # low-latency data (RFC 4594, 4.7)
        **dict.fromkeys((70, 79, 80), _AF21),
    }
)


@lru_cache(maxsize=1_024)
def qos_flow(
    five_qi: int,
    guaranteed_downlink_bps: int,
    guaranteed_uplink_bps: int,
    max_downlink_bps: int | None,
    max_uplink_bps: int | None,
) -> QosFlow:
    """Return what the user plane is told of a lease's QoS. KeyError if there is no such 5QI."""
    characteristics = FIVE_QIS[five_qi]
    return QosFlow(
        five_qi=five_qi,
        priority_level=characteristics.priority_level,
        guaranteed=characteristics.guaranteed,
        delay_critical=characteristics.resource_type is ResourceType.DELAY_CRITICAL_GBR,
        dscp=DSCPS.get(five_qi, 0),
        guaranteed_downlink_bps=guaranteed_downlink_bps,
        guaranteed_uplink_bps=guaranteed_uplink_bps,
        max_downlink_bps=max_downlink_bps,
        max_uplink_bps=max_uplink_bps,
    )
