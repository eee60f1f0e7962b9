"""The netlink socket into the nftables of one network namespace: batches out, answers back.

Everything here is synchronous: the kernel handles a batch while it is being sent, in tens of
microseconds, so that waiting for it costs less than going through an event loop.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyroute2.netlink import NLM_F_DUMP, NLM_F_REQUEST

from upf.attributes import NLMSG
from upf.elements import (
    ADD_FLAGS,
    ADD_NEW_FLAGS,
    ADD_TYPE,
    ElementChange,
    encode_batch,
    encode_dump,
    encode_look_up,
    is_deletion,
)
from upf.messages import Message
from upf.netns import in_namespace

NETLINK_NETFILTER = 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_DUMP_INTR = 0x10
SOL_NETLINK, NETLINK_CAP_ACK = 270, 10
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
BUFFER_BYTES = 16 << 20
RECEIVE_BYTES = 1 << 18
MAX_TRIES = 10
MAX_QUERIES = 512  # in one send: their answers must find room in the receive buffer
# The kernel answers while it handles the send; an answer that is not there by then never comes.
ANSWER_TIMEOUT_S = 5

_ERROR = struct.Struct("=i")
_TIMEVAL = struct.Struct("@ll")


class BatchError(Exception):
    """The kernel refused a batch; none of it took effect."""

    def __init__(self, code: int, what: str) -> None:
        self.code = code
        super().__init__(f"nf_tables refused {what}: {os.strerror(code)}")


class NftSocket:
    """Talks nf_tables with the kernel about one network namespace.

    `in_place_renewal`: adding an element that exists renews its timeout. Where the kernel would
    silently leave it as it is, it is deleted first.
    """

    def __init__(self, netns_path: str, *, in_place_renewal: bool) -> None:
        self._add_flags = ADD_FLAGS if in_place_renewal else ADD_NEW_FLAGS
        self._socket = in_namespace(netns_path, _open)
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._next_number = 1

    def close(self) -> None:
        """Close the socket. What it installed lives on."""
        self._socket.close()

    def commit(self, changes: Sequence[ElementChange]) -> None:
        """Apply element changes in one atomic batch.

        Deleting what is not there is no error, nor is adding what is there: the caller cannot
        know to the tick when an element expires. When this returns the kernel has acknowledged.
        Raises BatchError if it refused.
        """
        deletions_alone = False
        for _ in range(MAX_TRIES):
            if not changes:
                return
            batch = encode_batch(
                changes,
                self._number(len(changes)),
                self._add_flags,
                deletions_alone=deletions_alone,
            )
            codes = self._exchange(batch.data, batch.first_number, len(batch.groups))
            if not any(codes):
                return
            corrected: list[ElementChange] = []
            for group, code in zip(batch.groups, codes, strict=True):
                if code == errno.ENOENT and is_deletion(group[0]):
                    deletions_alone = True
                    if len(group) > 1:  # one of these has expired meanwhile
                        corrected += group
                elif code == errno.EEXIST:  # one of these has not expired yet
                    corrected += [change[:2] for change in group]
                    corrected += group
                    deletions_alone = True  # and the others have
                elif code:
                    verb = "delete" if is_deletion(group[0]) else "add"
                    raise BatchError(code, f"to {verb} an element of {group[0][0]}")
                else:
                    corrected += group
            changes = corrected
        raise BatchError(errno.EAGAIN, "every try of a batch")

    def commit_messages(self, messages: Sequence[Message]) -> None:
        """Send pyroute2 messages, enclosed by `messages.batch`, as one atomic batch."""
        first = self._number(len(messages))
        data = b""
        for number, message in enumerate(messages[1:-1], start=first):
            message["header"]["sequence_number"] = number
        for message in messages:
            message.encode()
            data += message.data
        codes = self._exchange(data, first, len(messages) - 2)
        for message, code in zip(messages[1:-1], codes, strict=True):
            if code:
                raise BatchError(code, f"{type(message).__name__} {message['attrs'][:2]}")

    def dump(self, message: Message) -> list[Any]:
        """Send one pyroute2 query for all there are of a kind and return the decoded answers."""
        message["header"]["flags"] = NLM_F_REQUEST | NLM_F_DUMP
        decoded = []
        for data in self._dump(lambda number: _numbered(message, number)):
            answer = type(message)(data)
            answer.decode()
            decoded.append(answer)
        return decoded

    def dump_elements(self, set_name: str) -> list[bytes]:
        """Return the kernel's messages with all elements of a set."""
        return self._dump(lambda number: encode_dump(set_name, number))

    def look_up(self, names: Sequence[tuple[str, bytes]]) -> list[bytes | None]:
        """Return the kernel's message about each element (set, key); None if there is no such.

        Each has a request of its own, for one that fails ends its request: many of them in one
        send, answered in their order.
        """
        answers: list[bytes | None] = []
        for start in range(0, len(names), MAX_QUERIES):
            chunk = names[start : start + MAX_QUERIES]
            number = self._number(1)
            self._socket.send(encode_look_up(chunk, number))
            while len(answers) < start + len(chunk):
                for kind, _, found, data in self._receive():
                    if found != number:
                        continue
                    if kind == ADD_TYPE:
                        answers.append(data)
                    elif kind == NLMSG_ERROR:
                        code = _error_code(data)
                        if code != errno.ENOENT:
                            raise BatchError(code, "to look up an element")
                        answers.append(None)
        return answers

    def _number(self, count: int) -> int:
        first = self._next_number
        self._next_number = first + count if first + count < 1 << 31 else 1
        return first

    def _exchange(self, data: bytes, first: int, count: int) -> list[int]:
        """Send requests `first` to `first + count - 1`; return an error code (0: done) for each.

        The last one asks for an acknowledgement; of the others the kernel reports failures, first.
        """
        self._socket.send(data)
        codes: dict[int, int] = {}
        while first + count - 1 not in codes:
            for kind, _, number, answer in self._receive():
                if kind == NLMSG_ERROR:
                    code = _error_code(answer)
                    if first <= number < first + count:
                        codes[number] = code
                    elif number == 0 and code:  # begin or end: the batch as a whole
                        raise BatchError(code, "the batch")
        return [codes.get(number, 0) for number in range(first, first + count)]

    def _dump(self, request: Callable[[int], bytes]) -> list[bytes]:
        """Send a query, given its number, and return all messages of its answer."""
        for _ in range(MAX_TRIES):
            number = self._number(1)
            self._socket.send(request(number))
            answers = self._collect(number)
            if answers is not None:
                return answers
        raise OSError(errno.EAGAIN, "the ruleset changed during every try to read it")

    def _collect(self, wanted: int) -> list[bytes] | None:
        """Receive the answers to one query; None if the kernel says they are inconsistent."""
        answers: list[bytes] = []
        consistent = True
        while True:
            for kind, flags, number, data in self._receive():
                if number != wanted:
                    continue
                consistent = consistent and not flags & NLM_F_DUMP_INTR
                if kind == NLMSG_DONE:
                    return answers if consistent else None
                if kind == NLMSG_ERROR:
                    code = _error_code(data)
                    if code == errno.ENOENT:
                        return answers
                    raise BatchError(code, "a query")
                answers.append(data)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Receive once: the type, flags and number of each message, and all of its bytes."""
        buffer = self._buffer
        received = self._socket.recv_into(buffer)
        offset = 0
        while offset + NLMSG.size <= received:
            length, kind, flags, number, _ = NLMSG.unpack_from(buffer, offset)
            yield kind, flags, number, bytes(buffer[offset : offset + length])
            offset += (length + 3) & ~3


def _numbered(message: Message, number: int) -> bytes:
    message["header"]["sequence_number"] = number
    message.encode()
    return bytes(message.data)


def _error_code(answer: bytes) -> int:
    return -int(_ERROR.unpack_from(answer, NLMSG.size)[0])


def _open() -> socket.socket:
    handle = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
    )
    handle.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
    for option in (SO_RCVBUFFORCE, SO_SNDBUFFORCE):
        handle.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    # In the kernel; Python's own time-out costs a poll before every call.
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(ANSWER_TIMEOUT_S, 0))
    handle.bind((0, 0))
    return handle
