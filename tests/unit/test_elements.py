"""The packed encoder says exactly what pyroute2's encoder says."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import NLM_F_REQUEST
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFT_MSG_DELSETELEM,
    NFT_MSG_GETSETELEM,
    NFT_MSG_NEWSETELEM,
)

from upf.elements import (
    ADD_FLAGS,
    ADD_TYPE,
    DELETE_FLAGS,
    DELETE_TYPE,
    MAX_ELEMENTS,
    Add,
    Counters,
    Delete,
    ElementChange,
    encode_additions,
    encode_batch,
    encode_deletions,
    encode_look_up,
    encode_message,
)
from upf.messages import batch, element_message, key_attribute

U64 = st.integers(0, 2**64 - 1)
SETS = st.sampled_from(["steer4", "return6", "qos4", "drain6"])
ADDS = st.builds(
    Add,
    SETS,
    st.binary(min_size=4, max_size=64),
    U64,
    st.one_of(st.just(b""), st.binary(min_size=4, max_size=4)),
    st.one_of(st.just(b""), st.from_regex(rb"[0-9a-f]{1,40} [0-9]{1,9}", fullmatch=True)),
    st.one_of(st.none(), st.builds(Counters, U64, U64)),
)
DELETES = st.builds(Delete, SETS, st.binary(min_size=4, max_size=64))


def as_pyroute2(change: ElementChange) -> dict[str, Any]:
    attributes = [key_attribute(change.key)]
    if isinstance(change, Add):
        if change.data:
            data = {"attrs": [("NFTA_DATA_VALUE", change.data)]}
            attributes.append(("NFTA_SET_ELEM_DATA", data))
        attributes.append(("NFTA_SET_ELEM_TIMEOUT", change.timeout_ms))
        if change.comment:
            comment = [("NFTNL_UDATA_SET_ELEM_COMMENT", change.comment)]
            attributes.append(("NFTA_SET_ELEM_USERDATA", comment))
        if change.counters:
            values = [
                ("NFTA_COUNTER_BYTES", change.counters.bytes),
                ("NFTA_COUNTER_PACKETS", change.counters.packets),
            ]
            counter = [("NFTA_EXPR_NAME", "counter"), ("NFTA_EXPR_DATA", {"attrs": values})]
            attributes.append(("NFTA_SET_ELEM_EXPR", {"attrs": counter}))
    return {"attrs": attributes}


@given(ADDS, st.integers(0, 2**32 - 1))
def test_an_addition_equals_pyroute2(change: Add, number: int) -> None:
    message = element_message(NFT_MSG_NEWSETELEM, change.set_name, [as_pyroute2(change)])
    message["header"]["flags"] = ADD_FLAGS
    message["header"]["sequence_number"] = number
    message.encode()
    elements = encode_additions([change])
    packed = encode_message(ADD_TYPE, ADD_FLAGS, change.set_name, elements, number)
    assert packed == bytes(message.data)


@given(DELETES)
def test_a_deletion_equals_pyroute2(change: Delete) -> None:
    message = element_message(NFT_MSG_DELSETELEM, change.set_name, [as_pyroute2(change)])
    message["header"]["flags"] = DELETE_FLAGS
    message.encode()
    packed = encode_message(
        DELETE_TYPE, DELETE_FLAGS, change.set_name, encode_deletions([change]), 0
    )
    assert packed == bytes(message.data)


@given(st.lists(ADDS, max_size=5), st.lists(DELETES, max_size=5))
def test_many_are_one_after_the_other(adds: list[Add], deletes: list[Delete]) -> None:
    """pyroute2 numbers the elements of a list; the kernel's header calls each of them 1."""
    assert encode_additions(adds) == b"".join(encode_additions([add]) for add in adds)
    assert encode_deletions(deletes) == b"".join(encode_deletions([each]) for each in deletes)


@given(st.lists(DELETES, min_size=1, max_size=5), st.integers(1, 2**32 - 1))
def test_a_look_up_equals_pyroute2(wanted: list[Delete], number: int) -> None:
    names = [(each.set_name, each.key[:4]) for each in wanted]
    expected = b""
    for set_name, key in names:
        elements = [{"attrs": [key_attribute(key)]}]
        message = element_message(NFT_MSG_GETSETELEM, set_name, elements)
        message["header"]["flags"] = NLM_F_REQUEST
        message["header"]["sequence_number"] = number
        message.encode()
        expected += bytes(message.data)
    assert encode_look_up(names, number) == expected


def test_the_batch_is_enclosed_as_pyroute2_does() -> None:
    begin, end = batch([])
    begin.encode()
    end.encode()
    encoded = encode_batch([Delete("steer4", b"12345678")], 1).data
    assert encoded.startswith(bytes(begin.data))
    assert encoded.endswith(bytes(end.data))


@given(st.lists(st.one_of(ADDS, DELETES), max_size=20), st.booleans())
def test_order_is_kept_and_only_neighbours_share(changes: list[ElementChange], alone: bool) -> None:
    groups = encode_batch(changes, 1, deletions_alone=alone).groups
    assert [change for group in groups for change in group] == changes
    for group in groups:
        assert len({(type(change), change.set_name) for change in group}) == 1
        assert len(group) == 1 or not alone or isinstance(group[0], Add)


def test_a_request_fits_its_length_fields() -> None:
    largest = Add("return6", bytes(64), 2**64 - 1, bytes(4), b"x" * 250, Counters(1, 1))
    groups = encode_batch([largest] * (MAX_ELEMENTS + 1), 1).groups
    assert [len(group) for group in groups] == [MAX_ELEMENTS, 1]
    assert len(encode_additions([largest] * MAX_ELEMENTS)) + 4 < 2**16
