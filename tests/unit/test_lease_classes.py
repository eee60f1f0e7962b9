"""Whatever comes and goes, no two leases share a class unless one took the other's place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.enforcement import Binding, EnforcementError
from controlplane.five_qi import qos_flow
from upf import lease_classes
from upf.lease_classes import LeaseClasses
from upf.qos import is_lease

QOS = [qos_flow(4, rate, 0, None, None) for rate in (1_000, 2_000)]


def binding(lease_id: str, kind: int) -> Binding:
    return Binding(lease_id=lease_id, epoch=1, flows=(), anchor=None, qos=QOS[kind], expires_ns=1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"),
            st.integers(0, 1),
            st.none() | st.sampled_from("abcdef"),
            st.booleans(),
        )
    )
)
def test_a_class_is_of_one_lease(steps: list[tuple[str, int, str | None, bool]]) -> None:
    """A step opens a lease, perhaps in another's place, or ends it."""
    classes = LeaseClasses((), {"known": 0xA15_1003})
    live = {"known": binding("known", 0)}
    for lease_id, kind, instead_of, opens in steps:
        if opens and lease_id not in live:
            new = binding(lease_id, kind)
            old = live.pop(instead_of, None) if instead_of else None
            before = old and classes.class_of(old)
            classes.open([(new, old)])
            live[lease_id] = new
            if old is not None:
                classes.forget([old.lease_id])
                assert (classes.class_of(new) == before) is (old.qos == new.qos)
        elif live.pop(lease_id, None) is not None:
            classes.forget([lease_id])
        held = [classes.class_of(one) for one in live.values()]
        assert len(set(held)) == len(held)
        assert all(map(is_lease, held))


def test_when_every_class_is_taken_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_classes, "LAST_LEASE", lease_classes.FIRST_LEASE + 1)
    classes = LeaseClasses((), {})
    first, *others = (binding(lease_id, 0) for lease_id in "abc")
    classes.open([(first, None)])
    with pytest.raises(EnforcementError, match="every QoS class is taken"):
        classes.open([(one, None) for one in others])
    assert classes.open([(others[0], None)]) == ["b"]
