"""What the gate wants of the kernel keeps the invariants, whatever operations come."""

import sys
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.enforcement import (
    Binding,
    EndDrain,
    EnforcementError,
    Flow,
    Install,
    Move,
    Operation,
    QosFlow,
    Renew,
    Revoke,
    StaleEpochError,
)
from controlplane.five_qi import qos_flow
from upf.config import AnchorPort, Attachment, GateConfig
from upf.fastpath import Ports
from upf.flows import NO_LEASE, LeaseElements, comment_of, flow_key, next_state, parse_comment
from upf.lease_classes import LeaseClasses
from upf.marking import Marking
from upf.timed import Wanted

FLOW = Flow(IPv4Address("10.45.0.1"), IPv4Address("198.18.0.1"))
FLOW6 = Flow(IPv6Address("fd00:45::1"), IPv6Address("fd00:a151::1"))
KEY = flow_key(FLOW)
# b and c stand behind one interface.
PORTS = {"a": "n6-a", "b": "n6-bc", "c": "n6-bc"}
CONFIG = GateConfig(
    n3_interfaces=("n3",),
    anchors=tuple(
        AnchorPort(
            name=name,
            interface=interface,
            address4=IPv4Address("10.47.0.2"),
            address6=IPv6Address("fd00:47::2"),
        )
        for name, interface in PORTS.items()
    ),
    attachments=(Attachment("n3", FLOW.ue),),
)
GOLD, BEST_EFFORT = qos_flow(80, 0, 0, None, None), qos_flow(9, 0, 0, None, None)
INDEX = {"n3": 1, "n6-a": 2, "n6-bc": 3}
THERE = Ports(INDEX, dict.fromkeys(INDEX, 1500), True)
ELEMENTS = LeaseElements(CONFIG, LeaseClasses((), {}).class_of, THERE)


def binding(
    epoch: int, anchor: str | None, expires_ns: int = 1_000, qos: QosFlow = GOLD
) -> Binding:
    return Binding(
        lease_id=f"{epoch:04x}",
        epoch=epoch,
        flows=(FLOW,),
        anchor=anchor,
        qos=qos,
        expires_ns=expires_ns,
    )


BINDINGS = st.builds(
    binding,
    st.integers(1, 6),
    st.sampled_from(["a", "b", "c", None]),
    st.integers(1, 1_000),
    st.sampled_from([GOLD, BEST_EFFORT]),
)
ANCHORED = BINDINGS.filter(lambda each: each.anchor is not None)
OPERATIONS = st.one_of(
    st.builds(Install, BINDINGS),
    st.builds(Move, ANCHORED, ANCHORED, st.integers(1, 1_500)),
    st.builds(Renew, BINDINGS),
    st.builds(Revoke, BINDINGS),
    st.builds(EndDrain, ANCHORED),
)


@given(st.lists(st.tuples(OPERATIONS, st.integers(0, 50)), max_size=20))
def test_every_element_belongs_to_a_lease_and_ends_with_it(
    steps: list[tuple[Operation, int]],
) -> None:
    state, now = NO_LEASE, 0
    ends: dict[bytes, int] = {}  # comment -> the latest that any operation allowed
    for operation, pause in steps:
        now += pause
        ELEMENTS.check(operation)
        named = (operation.new, operation.old) if isinstance(operation, Move) else ()
        for each in named or (getattr(operation, "binding", None),):
            if each is not None:
                comment = comment_of(each)
                ends[comment] = max(ends.get(comment, 0), each.expires_ns)
        try:
            after = next_state(operation, state, now)
        except StaleEpochError:
            assert not isinstance(operation, EndDrain)
            continue
        assert after.epoch >= state.epoch
        state = after
        elements = ELEMENTS.of(KEY, state)
        assert len({wanted[:2] for wanted in elements}) == len(elements)
        for _, key, _, comment, deadline_ns, _ in elements:
            assert key.startswith(KEY)
            assert deadline_ns <= ends[comment]
        held = state.binding
        by_set: dict[str, list[bytes]] = {}
        for set_name, _, _, comment, _, _ in elements:
            by_set.setdefault(set_name, []).append(comment)
        steered = held is not None and held.anchor is not None
        prioritised = held is not None and (held.anchor is None or held.qos == GOLD)
        assert by_set.get("steer4", []) == ([comment_of(held)] if held and steered else [])
        assert by_set.get("qos4", []) == ([comment_of(held)] if held and prioritised else [])
        assert all(held is None or drain[0].anchor != held.anchor for drain in state.draining)
        if isinstance(operation, Revoke):
            assert elements == []
        check_fast(elements, ELEMENTS.fast(KEY, state))


def check_fast(elements: list[Wanted], entries: list[Wanted]) -> None:
    """The fast path has an entry just where the gate has an element, of the same lease."""
    gate = {
        ("up4" if name == "steer4" else "down4", INDEX.get(port(key), 0)): rest[-3:-1]
        for name, key, *rest in elements
        if name in ("steer4", "return4")
    }
    fast = {
        (name, int.from_bytes(key[8:], sys.byteorder)): rest[-3:-1] for name, key, *rest in entries
    }
    assert fast == gate
    assert len(fast) == len(entries)


def port(key: bytes) -> str:
    return key[len(KEY) :].rstrip(b"\0").decode()


def test_a_drain_that_is_over_is_forgotten() -> None:
    """Else every later operation would delete what the kernel has long ended."""
    moved = next_state(Move(binding(2, "b"), binding(1, "a"), 100), NO_LEASE, 0)
    assert len(moved.draining) == 1
    assert next_state(Renew(binding(2, "b")), moved, 99).draining == moved.draining
    assert next_state(Renew(binding(2, "b")), moved, 100).draining == ()


@pytest.mark.parametrize(("old", "new"), [("a", None), (None, "a"), (None, None)])
def test_nothing_moves_without_anchors(old: str | None, new: str | None) -> None:
    with pytest.raises(EnforcementError, match="without anchors"):
        ELEMENTS.check(Move(binding(2, new), binding(1, old), 100))


@pytest.mark.parametrize("qos", [GOLD, BEST_EFFORT])
def test_a_lease_of_qos_alone_is_one_element_that_counts(qos: QosFlow) -> None:
    lease = binding(1, None, qos=qos)
    state = next_state(Install(lease), NO_LEASE, 0)
    ((set_name, key, data, comment, deadline_ns, counters),) = ELEMENTS.of(KEY, state)
    assert (set_name, key, deadline_ns) == ("qos4", KEY, lease.expires_ns)
    assert Marking.decode(data) == ((0xA150050, 18) if qos == GOLD else (0, 0))
    assert parse_comment(comment) == (lease.lease_id, 1)
    assert counters is not None
    assert ELEMENTS.counting(KEY, lease) == ((set_name, key),)


def test_families_have_sets_of_their_own() -> None:
    for flow, suffix in ((FLOW, "4"), (FLOW6, "6")):
        state = next_state(Install(binding(1, "a")), NO_LEASE, 0)
        names = [wanted[0] for wanted in ELEMENTS.of(flow_key(flow), state)]
        assert names == [f"{stem}{suffix}" for stem in ("steer", "return", "qos")]
