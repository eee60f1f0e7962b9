"""Packed HTB requests are, byte for byte, what pyroute2 makes of the same attributes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST
from pyroute2.netlink.rtnl import RTM_DELTCLASS, RTM_NEWQDISC, RTM_NEWTCLASS
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from controlplane.five_qi import FIVE_QIS, qos_flow
from upf import htb
from upf.config import QosPoint
from upf.htb import HtbClass, encode_class, encode_queue, encode_removal
from upf.lease_classes import lease_class
from upf.qos import priority

rates = st.integers(1, (1 << 40) - 1)
classes = st.builds(
    HtbClass,
    class_id=st.integers(0x1_0001, 0x1_7FFF),
    parent=st.integers(0x1_0000, 0x1_0001),
    rate=rates,
    ceil=rates,
    priority=st.integers(0, 7),
)
numbers, indices = st.integers(0, (1 << 32) - 1), st.integers(1, (1 << 31) - 1)


def pyroute2_bytes(
    kind: int, flags: int, index: int, handle: int, parent: int, number: int, attrs: list[Any]
) -> bytes:
    message = tcmsg()
    message.update(index=index, handle=handle, parent=parent, attrs=attrs)
    message["header"].update(type=kind, flags=NLM_F_REQUEST | flags, sequence_number=number)
    message.encode()
    return bytes(message.data)


@given(classes, indices, numbers)
def test_a_class(wanted: HtbClass, index: int, number: int) -> None:
    most = (1 << 32) - 1
    ticks = htb.BURST_MS * 1_000_000 // 64
    options: list[Any] = [
        (
            "TCA_HTB_PARMS",
            {
                "rate": min(wanted.rate, most),
                "rate___reserved": 1,  # link layer: Ethernet
                "ceil": min(wanted.ceil, most),
                "ceil___reserved": 1,
                "buffer": ticks,
                "cbuffer": ticks,
                "quantum": htb.QUANTUM_BYTES,
                "prio": wanted.priority,
            },
        )
    ]
    options += [("TCA_HTB_RATE64", wanted.rate)] if wanted.rate > most else []
    options += [("TCA_HTB_CEIL64", wanted.ceil)] if wanted.ceil > most else []
    attrs = [("TCA_KIND", "htb"), ("TCA_OPTIONS", {"attrs": options})]
    assert encode_class(index, wanted, number) == pyroute2_bytes(
        RTM_NEWTCLASS, NLM_F_CREATE, index, wanted.class_id, wanted.parent, number, attrs
    )


@given(classes, indices, numbers)
def test_its_queue_and_its_removal(wanted: HtbClass, index: int, number: int) -> None:
    attrs: list[Any] = [
        ("TCA_KIND", "pfifo"),
        ("TCA_OPTIONS", {"limit": htb.queue_packets(wanted.ceil)}),
    ]
    handle = (wanted.class_id & 0xFFFF) << 16
    flags = NLM_F_CREATE | NLM_F_REPLACE
    assert encode_queue(index, wanted, number) == pyroute2_bytes(
        RTM_NEWQDISC, flags, index, handle, wanted.class_id, number, attrs
    )
    assert encode_removal(index, wanted.class_id, number, NLM_F_ACK) == pyroute2_bytes(
        RTM_DELTCLASS, NLM_F_ACK, index, wanted.class_id, 0, number, []
    )


def test_a_queue_is_bounded_by_its_delay() -> None:
    assert htb.queue_packets(1_514 * 1_000) == 100  # of 1,000 packets a second, 100 ms
    assert htb.queue_packets(1_000) == htb.LEAST_QUEUE_PACKETS
    assert htb.queue_packets(10**12) == htb.MOST_QUEUE_PACKETS


def test_the_order_is_that_of_the_5qis() -> None:
    """Delay-critical GBR, GBR, the others; within each by priority level."""
    flows = [qos_flow(five_qi, 1, 1, None, None) for five_qi in FIVE_QIS]
    assert {priority(flow) for flow in flows} <= set(range(8))
    for one in flows:
        for other in flows:
            kinds = [(not flow.delay_critical, not flow.guaranteed) for flow in (one, other)]
            ranks = [
                (*kind, flow.priority_level) for kind, flow in zip(kinds, (one, other), strict=True)
            ]
            if ranks[0] < ranks[1]:
                assert priority(one) <= priority(other)
    assert priority(qos_flow(80, 0, 0, None, None)) < priority(qos_flow(9, 0, 0, None, None))


@pytest.mark.parametrize(("uplink", "rate", "ceil"), [(False, 1_000, 2_000), (True, 500, 8_000)])
def test_a_lease_has_its_rates_by_direction(uplink: bool, rate: int, ceil: int) -> None:
    """In frames: 1,514 bytes on the wire for each 1,500 of IP. Without MFBR: the capacity."""
    qos = qos_flow(4, 8_000 * 1_500, 4_000 * 1_500, 16_000 * 1_500, None)
    point = QosPoint(netns="", interface="", capacity_bps=64_000 * 1_500, uplink=uplink)
    made = lease_class(0xA15_1000, qos, point)
    assert (made.rate, made.ceil) == (rate * 1_514, ceil * 1_514)
