"""Canonical JSON is the reference library's, byte for byte, and never bytes for what has none."""

import json
import math
from typing import Any

import pytest
import rfc8785
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controlplane.canonical import canonical

# Any string that Python can hold, lone surrogates included, and those near what must be escaped.
strings = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=8),
    st.text('"\\/\b\f\n\r\t\0\x1f\x7f\x80\u2028\ufeff\uffff\U0001f600', max_size=8),
)
# Those around every change of notation, and any other.
numbers = st.one_of(
    st.integers(),
    st.integers(-3, 3).flatmap(lambda by: st.sampled_from([2**53 + by, -(2**53) + by, 2**64 + by])),
    st.floats(),
    st.floats(-1e22, 1e22),
    st.floats(1e-8, 1e-3),
    st.integers(-(2**60), 2**60).map(float),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=4),
    max_leaves=8,
)


def form(write: Any, value: Any) -> bytes | type[ValueError]:
    """What is written, or that nothing is."""
    try:
        written = write(value)
    except ValueError:
        return ValueError
    assert type(written) is bytes
    return written


@settings(max_examples=100)
@given(values)
@example({"\U0001f600": 1, "\uffff": 2})  # code points and UTF-16 sort them otherwise
@example({"b": [1.0, -0.0, 1e-7, 1e21, 1e16, 123456.789e-2], "a": {}})
@example(float("nan"))
@example([float("inf")])
@example({"\ud800": 1})
@example("\udfff")
@example(2**53)
def test_is_the_reference(value: Any) -> None:
    assert form(canonical, {"a": value}) == form(rfc8785.dumps, {"a": value})


def sound(value: Any) -> bool:
    """Whether JSON has it, and tells a reader the same number."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 2**53


@settings(max_examples=60)
@given(st.dictionaries(strings, numbers.filter(sound) | strings, max_size=4))
def test_tells_back_what_it_was_told(value: dict[str, Any]) -> None:
    written = form(canonical, value)
    if written is ValueError:
        with pytest.raises(UnicodeEncodeError):
            json.dumps(value, ensure_ascii=False).encode()
    else:
        assert isinstance(written, bytes)
        assert json.loads(written, parse_int=float) == value  # all numbers are doubles


@pytest.mark.parametrize(
    "value", [{1: 2}, {"a": object()}, {"a": {b"b": 1}}, {"a": b"b"}, {"a": {1}}, {"a": [math.nan]}]
)
def test_what_is_no_json_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical(value)


def test_a_tuple_is_an_array() -> None:
    assert canonical({"b": (1, 2.5), "a": ()}) == b'{"a":[],"b":[1,2.5]}'
