"""The netlink socket into the nftables of one network namespace: batches out, answers back.

Everything here is synchronous: the kernel handles a batch while it is being sent, in tens of
microseconds, so that waiting for it costs less than going through an event loop.
"""

import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST

from upf.elements import (
    ADD_FLAGS,
    ADD_NEW_FLAGS,
    Delete,
    ElementChange,
    EncodedBatch,
    encode_batch,
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
# The kernel answers while it handles the send; an answer that is not there by then never comes.
ANSWER_TIMEOUT_S = 5.0

_HEADER = struct.Struct("=IHHII")
_ERROR = struct.Struct("=i")


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
        batch = self._encode(changes)
        for _ in range(MAX_TRIES):
            if not batch.groups:
                return
            corrected: list[ElementChange] = []
            refused = 0
            codes = self._exchange(batch.data, batch.first_number, len(batch.groups))
            for group, code in zip(batch.groups, codes, strict=True):
                if code == errno.ENOENT and isinstance(group[0], Delete):
                    pass  # it expired meanwhile
                elif code == errno.EEXIST:  # one of these has not expired yet
                    corrected += [Delete(change.set_name, change.key) for change in group]
                    corrected += group
                elif code:
                    verb = type(group[0]).__name__.lower()
                    raise BatchError(code, f"to {verb} an element of {group[0].set_name}")
                else:
                    corrected += group
                refused += code != 0
            if not refused:
                return
            batch = self._encode(corrected)
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

    def get(self, message: Message, *, dump: bool) -> list[Any]:
        """Send one pyroute2 query and return the decoded answers; no answer if there is no such."""
        for _ in range(MAX_TRIES):
            number = self._number(1)
            message["header"]["sequence_number"] = number
            message["header"]["flags"] = NLM_F_REQUEST | (NLM_F_DUMP if dump else NLM_F_ACK)
            message.encode()
            self._socket.send(message.data)
            answers = self._collect(number, type(message))
            if answers is not None:
                return answers
        raise OSError(errno.EAGAIN, "the ruleset changed during every try to read it")

    def _encode(self, changes: Sequence[ElementChange]) -> EncodedBatch:
        return encode_batch(changes, self._number(len(changes)), self._add_flags)

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
            answer = self._socket.recv(RECEIVE_BYTES)
            offset = 0
            while offset + _HEADER.size <= len(answer):
                length, kind, _, number, _ = _HEADER.unpack_from(answer, offset)
                if kind == NLMSG_ERROR:
                    code = -_ERROR.unpack_from(answer, offset + _HEADER.size)[0]
                    if first <= number < first + count:
                        codes[number] = code
                    elif number == 0 and code:  # begin or end: the batch as a whole
                        raise BatchError(code, "the batch")
                offset += (length + 3) & ~3
        return [codes.get(number, 0) for number in range(first, first + count)]

    def _collect(self, wanted: int, kind: type) -> list[Any] | None:
        """Receive the answers to one query; None if the kernel says they are inconsistent."""
        answers: list[Any] = []
        consistent = True
        while True:
            data = self._socket.recv(RECEIVE_BYTES)
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, message_type, flags, number, _ = _HEADER.unpack_from(data, offset)
                if number == wanted:
                    consistent = consistent and not flags & NLM_F_DUMP_INTR
                    if message_type == NLMSG_DONE:
                        return answers if consistent else None
                    if message_type == NLMSG_ERROR:
                        code = -_ERROR.unpack_from(data, offset + _HEADER.size)[0]
                        if code in (0, errno.ENOENT):
                            return answers
                        raise BatchError(code, "a query")
                    answer = kind(data[offset : offset + length])
                    answer.decode()
                    answers.append(answer)
                offset += (length + 3) & ~3


def _open() -> socket.socket:
    handle = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
    )
    handle.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
    for option in (SO_RCVBUFFORCE, SO_SNDBUFFORCE):
        handle.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    handle.settimeout(ANSWER_TIMEOUT_S)
    handle.bind((0, 0))
    return handle
