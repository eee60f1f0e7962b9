"""How a control plane and a user plane agent talk: frames of JSON over a Unix socket.

A frame is its length (4 bytes, big-endian) and as many bytes of JSON. The caller greets, then asks
one question after the other; each gets one answer, in the same order.

    greeting   {"protocol": 2, "role": "controller", "now_ns": 123}
    question   ["apply", [["Install", {"binding": {...}}], ...]], ["usage", [binding, ...]],
               ["reconcile", [binding, ...]], ["enforced", null], ["drops", null],
               ["refuse", [[flow, ...], ms]], ["parked", null]
    answer     ["done", result], or ["StaleEpochError", "why"], ["EnforcementError", "why"]

Besides, the agent says ["first_packet", flow] when packets begin to wait for a lease of a flow.

Values are those of `controlplane.enforcement`, member by member. Deadlines in them are readings of
CLOCK_MONOTONIC: the two must be on one machine and in one time namespace, which the greeting shows.
The role `status` gets one answer, a description for people, and nothing else.
"""

import asyncio
import struct
from collections.abc import Sequence
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from controlplane.enforcement import (
    Binding,
    EndDrain,
    Enforced,
    EnforcementError,
    Flow,
    Hold,
    Install,
    Move,
    Operation,
    Parked,
    Reconciliation,
    Renew,
    Resume,
    Revoke,
    StaleEpochError,
    Usage,
)

PROTOCOL = 2
MAX_FRAME_BYTES = 1 << 28  # a reconciliation of half a million leases
MAX_GREETING_BYTES = 1 << 12
DONE = "done"
FIRST_PACKET = "first_packet"

_LENGTH = struct.Struct(">I")
_OPERATIONS: dict[str, TypeAdapter[Operation]] = {
    kind.__name__: TypeAdapter(kind)
    for kind in (Install, Move, Renew, Revoke, EndDrain, Hold, Resume)
}
_ERRORS = {kind.__name__: kind for kind in (EnforcementError, StaleEpochError)}
BINDINGS = TypeAdapter(list[Binding])
ENFORCED = TypeAdapter(list[Enforced])
USAGE = TypeAdapter(dict[str, Usage])
RECONCILIATION = TypeAdapter(Reconciliation)
FLOW = TypeAdapter(Flow)
REFUSED = TypeAdapter(tuple[list[Flow], int])  # flows, ms
PARKED = TypeAdapter(Parked)
DROPS = TypeAdapter(dict[str, int])


class ProtocolError(Exception):
    """The other side does not speak as it should."""


class Greeting(BaseModel):
    """What a caller says first."""

    model_config = ConfigDict(frozen=True)

    protocol: int
    role: Literal["controller", "status"]
    now_ns: int  # CLOCK_MONOTONIC, when it was said


def encode(message: object) -> bytes:
    """Return a message as a frame; dataclasses and addresses may be anywhere in it."""
    data = orjson.dumps(message, default=str)
    return _LENGTH.pack(len(data)) + data


async def read(reader: asyncio.StreamReader, most_bytes: int = MAX_FRAME_BYTES) -> Any:
    """Return the next message, as plain JSON types.

    Raises ProtocolError, or EOFError (IncompleteReadError) where there is none any more.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > most_bytes:
        raise ProtocolError(f"a frame of {length:,} bytes; {most_bytes:,} are allowed")
    try:
        return orjson.loads(await reader.readexactly(length))
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"not JSON: {error}") from error


def greeting(message: object) -> Greeting:
    """Return a caller's greeting. Raises ProtocolError."""
    try:
        return Greeting.model_validate(message)
    except ValidationError as error:
        raise ProtocolError(f"no greeting: {error.errors()[0]['msg']}") from error


def tagged(operations: Sequence[Operation]) -> list[tuple[str, Operation]]:
    """Return operations with their names, for `encode`."""
    return [(type(operation).__name__, operation) for operation in operations]


def operations(value: Any) -> list[Operation]:
    """Return the operations of a question. Raises ValueError, TypeError or KeyError."""
    return [_OPERATIONS[name].validate_python(members) for name, members in value]


def first_packet(message: Any) -> Flow | None:
    """Return the flow that packets begin to wait for, if a message says that they do.

    Raises ProtocolError.
    """
    match message:
        case [kind, flow] if kind == FIRST_PACKET:
            try:
                return FLOW.validate_python(flow)
            except ValidationError as error:
                raise ProtocolError(f"no flow: {error.errors()[0]['msg']}") from error
    return None


def refusal(error: EnforcementError) -> tuple[str, str]:
    """Return the answer that says why something was not done."""
    return (type(error).__name__, str(error))


def result(answer: Any) -> Any:
    """Return what an answer holds. Raises what the other side said that it raised."""
    try:
        kind, value = answer
    except (TypeError, ValueError):
        raise ProtocolError("an answer is no pair") from None
    if kind != DONE:
        raise _ERRORS.get(kind, EnforcementError)(value)
    return value
