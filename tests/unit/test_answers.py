"""The packed decoder finds what pyroute2's decoder finds, or says that it does not know."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.nfnetlink.nftsocket import NFT_MSG_NEWSETELEM

from upf.answers import Element, ElementDecoder
from upf.messages import element_message, key_attribute
from upf.readback import decode_with_pyroute2

U64 = st.integers(0, 2**64 - 1)
COUNTS = st.one_of(st.none(), st.tuples(U64, U64))


@st.composite
def elements_of_one_set(draw: st.DrawFn) -> list[Element]:
    """Keys are of one length; an element has data and counters, or has not, on its own."""
    size = draw(st.sampled_from([8, 12, 24, 32, 36, 48]))
    made = []
    for _ in range(draw(st.integers(0, 6))):
        counts = draw(COUNTS)
        made.append(
            Element(
                key=draw(st.binary(min_size=size, max_size=size)),
                data=draw(st.one_of(st.just(b""), st.binary(min_size=4, max_size=4))),
                comment=draw(st.from_regex(rb"[0-9a-f]{1,40} [0-9]{1,9}", fullmatch=True)),
                remaining_ms=draw(U64),
                counted=counts is not None,
                packets=counts[0] if counts else 0,
                bytes=counts[1] if counts else 0,
            )
        )
    return made


def as_told(element: Element, *, without: str = "") -> dict[str, Any]:
    """Return an element in pyroute2's terms, its attributes in the kernel's order."""
    attributes: list[tuple[str, Any]] = [key_attribute(element.key)]
    if element.data:
        data = {"attrs": [("NFTA_DATA_VALUE", element.data)]}
        attributes.append(("NFTA_SET_ELEM_DATA", data))
    if element.counted:
        values = [
            ("NFTA_COUNTER_BYTES", element.bytes),
            ("NFTA_COUNTER_PACKETS", element.packets),
        ]
        counter = [("NFTA_EXPR_NAME", "counter"), ("NFTA_EXPR_DATA", {"attrs": values})]
        attributes.append(("NFTA_SET_ELEM_EXPR", {"attrs": counter}))
    attributes += [
        ("NFTA_SET_ELEM_TIMEOUT", 2**40),
        ("NFTA_SET_ELEM_EXPIRATION", element.remaining_ms),
        ("NFTA_SET_ELEM_USERDATA", [("NFTNL_UDATA_SET_ELEM_COMMENT", element.comment)]),
    ]
    return {"attrs": [each for each in attributes if each[0] != without]}


def told(elements: list[dict[str, Any]]) -> bytes:
    message = element_message(NFT_MSG_NEWSETELEM, "steer4", elements)
    message.encode()
    return bytes(message.data)


@given(elements_of_one_set())
def test_decoding_equals_pyroute2(elements: list[Element]) -> None:
    message = told([as_told(element) for element in elements])
    assert ElementDecoder("steer4").decode(message) == decode_with_pyroute2(message) == elements


@given(elements_of_one_set(), st.data())
def test_another_shape_is_not_guessed_at(elements: list[Element], data: st.DataObject) -> None:
    """Without a timeout or a comment an element is none of ours."""
    if not elements:
        return
    odd = data.draw(st.integers(0, len(elements) - 1))
    missing = data.draw(st.sampled_from(["NFTA_SET_ELEM_TIMEOUT", "NFTA_SET_ELEM_USERDATA"]))
    message = told(
        [
            as_told(element, without=missing if number == odd else "")
            for number, element in enumerate(elements)
        ]
    )
    assert ElementDecoder("steer4").decode(message) is None
    assert len(decode_with_pyroute2(message)) == len(elements)


@given(elements_of_one_set(), st.data())
def test_a_message_cut_short_is_seen(elements: list[Element], data: st.DataObject) -> None:
    made = [as_told(element) for element in elements]
    message = told(made)
    cut = data.draw(st.integers(len(told([])), len(message)))
    whole = {len(told(made[:count])): elements[:count] for count in range(len(made) + 1)}
    assert ElementDecoder("steer4").decode(message[:cut]) == whole.get(cut)
