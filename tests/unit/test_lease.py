"""The COMMIT's state machine: every state with every command, and properties of every history."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane import lease
from controlplane.enforcement import Flow, Usage
from controlplane.five_qi import qos_flow
from controlplane.intent import Intent
from controlplane.lease import Effect, EndReason, Lease, LeaseError, State, Terms, evolve, step

TERMS = Terms(
    lease_id="lease",
    session_id="session",
    cause="PAGE",
    tenant="default",
    ue="ue1",
    aisi="chat",
    anchor="edge1",
    flows=(Flow(ip_address("10.45.0.1"), ip_address("198.18.0.1")),),
    epoch=1,
    qos_profile="QOS_E",
    cell="gnb1",
    downlink_bps=0,
    uplink_bps=0,
    priority_level=8,
    preemptible=True,
    intent=Intent(task="text-generation"),
)
USAGE = Usage(uplink_packets=1, uplink_bytes=2, downlink_packets=3, downlink_bytes=4)
DEADLINE, NOW, LATER = 1_000, 500, 2_000
COMMANDS = [
    lease.Commit(LATER),
    lease.Renew(LATER),
    lease.Supersede(DEADLINE - 100),
    lease.Release(),
    lease.Revoke(),
    lease.Fail(),
    lease.Abort(),
    lease.Tick(),
]
REFUSED = "refused"

# What every command does in every state, before the state's deadline.
EXPECTED = {
    State.PREPARED: {
        lease.Commit: State.COMMITTED,
        lease.Abort: EndReason.ABORTED,
        lease.Fail: EndReason.NOT_ENFORCED,
        lease.Tick: State.PREPARED,
    },
    State.COMMITTED: {
        lease.Renew: State.COMMITTED,
        lease.Supersede: State.DRAINING,
        lease.Release: EndReason.RELEASED,
        lease.Revoke: EndReason.REVOKED,
        lease.Fail: EndReason.NOT_ENFORCED,
        lease.Tick: State.COMMITTED,
    },
    State.DRAINING: {
        lease.Release: EndReason.RELEASED,
        lease.Revoke: EndReason.REVOKED,
        lease.Fail: EndReason.NOT_ENFORCED,
        lease.Tick: State.DRAINING,
    },
    State.ENDED: {lease.Tick: State.ENDED},
}
# At the deadline time alone ends a lease, and nothing can be granted or extended any more.
EXPECTED_LATE = {
    State.PREPARED: {lease.Tick: EndReason.PREPARE_TIMED_OUT, lease.Commit: REFUSED},
    State.COMMITTED: {
        lease.Tick: EndReason.EXPIRED,
        lease.Renew: REFUSED,
        lease.Supersede: REFUSED,
    },
    State.DRAINING: {lease.Tick: EndReason.RELOCATED},
    State.ENDED: {},
}


def held(state: State) -> Lease:
    reason = EndReason.EXPIRED if state is State.ENDED else None
    return Lease(terms=TERMS, state=state, deadline_ns=DEADLINE, end_reason=reason)


def outcome_of(state: State, command: lease.Command, now_ns: int) -> object:
    try:
        after = step(held(state), command, now_ns).lease
    except LeaseError as error:
        assert error.lease_id == TERMS.lease_id
        return REFUSED
    return (
        after.end_reason if after.state is State.ENDED and state is not State.ENDED else after.state
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
@pytest.mark.parametrize("state", State)
def test_every_state_with_every_command(state: State, command: lease.Command) -> None:
    expected = EXPECTED[state].get(type(command), REFUSED)
    assert outcome_of(state, command, NOW) == expected
    late = EXPECTED_LATE[state].get(type(command), expected)
    assert outcome_of(state, command, DEADLINE) == late


def test_a_grant_that_would_already_be_over_is_refused() -> None:
    with pytest.raises(LeaseError, match="already have expired"):
        step(held(State.PREPARED), lease.Commit(NOW), NOW)


def test_renewal_never_shortens() -> None:
    with pytest.raises(LeaseError, match="shorten"):
        step(held(State.COMMITTED), lease.Renew(DEADLINE - 1), NOW)


def test_a_drain_never_outlives_its_lease() -> None:
    drained = step(held(State.COMMITTED), lease.Supersede(LATER), NOW).lease
    assert drained.deadline_ns == DEADLINE


@pytest.mark.parametrize("state", [State.COMMITTED, State.DRAINING])
@pytest.mark.parametrize("reason", EndReason)
def test_the_network_takes_a_lease_back_only_for_its_own_reasons(
    state: State, reason: EndReason
) -> None:
    own = {"REVOKED", "REPAGED", "PREEMPTED", "ANCHOR_FAILED", "POLICY", "CELL_FULL"}
    if reason in own:
        assert step(held(state), lease.Revoke(reason), NOW).lease.end_reason is reason
    else:
        with pytest.raises(LeaseError, match=f"cannot be for {reason}"):
            step(held(state), lease.Revoke(reason), NOW)


def test_closing_counts_are_the_leases_last_word() -> None:
    ended = lease.Ended("lease", EndReason.RELEASED, USAGE, NOW)
    assert evolve(held(State.COMMITTED), ended).usage == USAGE
    with pytest.raises(ValueError, match="never prepared"):
        evolve(None, ended)


def test_a_binding_is_what_the_lease_authorises_now() -> None:
    drained = step(held(State.COMMITTED), lease.Supersede(NOW + 100), NOW).lease
    for current in (held(State.COMMITTED), drained):
        binding = current.binding()
        assert (binding.lease_id, binding.epoch, binding.anchor) == ("lease", 1, "edge1")
        assert (binding.flows, binding.qos) == (TERMS.flows, qos_flow(9, 0, 0, None, None))
        assert binding.expires_ns == current.deadline_ns


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, lease.Command]]:
    instants = sorted(draw(st.lists(st.integers(0, 3_000), max_size=12)))
    commands = st.one_of(
        st.builds(lease.Commit, st.integers(0, 3_000)),
        st.builds(lease.Renew, st.integers(0, 3_000)),
        st.builds(lease.Supersede, st.integers(0, 3_000)),
        st.sampled_from(COMMANDS[3:]),
    )
    return [(instant, draw(commands)) for instant in instants]


@given(histories())
def test_whatever_happens(history: list[tuple[int, lease.Command]]) -> None:
    outcome = lease.prepare(TERMS, DEADLINE)
    current, events, effects = outcome.lease, list(outcome.events), list(outcome.effects)
    for now_ns, command in history:
        try:
            outcome = step(current, command, now_ns)
        except LeaseError:
            continue
        if current.state is State.ENDED:
            assert outcome.lease == current  # nothing comes back to life
            assert not outcome.events
        if outcome.lease.state in (State.COMMITTED, State.DRAINING) and outcome.events:
            assert outcome.lease.deadline_ns > now_ns or current.state is State.COMMITTED
        current = outcome.lease
        events += outcome.events
        effects += outcome.effects

    rebuilt = None
    for event in events:
        rebuilt = evolve(rebuilt, event)
    assert rebuilt == current  # the journal alone tells the same story

    # The user plane opens once at most, and closes exactly once if it opened; what it holds is
    # freed once.
    assert effects.count(Effect.OPEN) <= 1
    over = current.state is State.ENDED
    closed = effects.count(Effect.CLOSE) + effects.count(Effect.END_DRAIN)
    assert closed == (effects.count(Effect.OPEN) if over else 0)
    assert effects.count(Effect.FREE) == int(over)
