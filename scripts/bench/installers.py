"""The ways there are to put one lease's elements into the kernel, each timed around its own call.

All of them get the same elements and end when the kernel has acknowledged.
"""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Coroutine, Sequence
from ipaddress import ip_address
from typing import Any, Protocol

from pyroute2.netlink.nfnetlink.nftsocket import NFT_MSG_NEWSETELEM
from pyroute2.netns import setns
from pyroute2.nftables.main import AsyncNFTables

from controlplane.enforcement import Binding
from scripts.errors import UserError
from upf.elements import MAX_ELEMENTS, Add
from upf.flows import LeaseElements, flow_key, holding
from upf.marking import Marking
from upf.messages import TABLE, batch, element_message, key_attribute
from upf.netns import in_namespace
from upf.nft_socket import NftSocket

TIMEOUT_MS = 600_000


class Installer(Protocol):
    """One way to install elements."""

    def install(self, elements: Sequence[Add]) -> int:
        """Install elements in one transaction; return what that took, in nanoseconds."""

    def close(self) -> None:
        """Let go of sockets and threads."""


def commit_elements(elements: LeaseElements, binding: Binding) -> list[Add]:
    """Return the elements of one COMMIT, as the gate makes them."""
    state = holding(binding, ())
    return [
        Add(set_name, key, TIMEOUT_MS, data, comment)
        for flow in binding.flows
        for set_name, key, data, comment, _, _ in elements.of(flow_key(flow), state)
    ]


class PackedInstaller:
    """The packed encoder on a plain netlink socket."""

    def __init__(self, netns_path: str) -> None:
        self.socket = NftSocket(netns_path, in_place_renewal=True)

    def install(self, elements: Sequence[Add]) -> int:
        """Encode, send and wait for the acknowledgement."""
        begin_ns = time.perf_counter_ns()
        self.socket.commit(elements)
        return time.perf_counter_ns() - begin_ns

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class Pyroute2Installer:
    """pyroute2's own message classes and `AsyncNFTables.nlm_request_batch`, in its own event loop.

    The loop runs in a thread inside the namespace. The clock is read within that thread, so that
    crossing threads is not counted.
    """

    def __init__(self, netns_path: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._path = netns_path
        self._thread = threading.Thread(target=self._serve, name="pyroute2", daemon=True)
        self._thread.start()
        self._nft: Any = self._call(self._open())

    def install(self, elements: Sequence[Add]) -> int:
        """Build messages, one per set and 128 elements, and send them as one batch."""
        return int(self._call(self._install(elements)))

    def close(self) -> None:
        """Close the socket and end the thread."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _serve(self) -> None:
        setns(self._path)
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self) -> Any:
        nft = AsyncNFTables()
        await nft.setup_endpoint()
        return nft

    async def _close(self) -> None:
        self._nft.close()

    async def _install(self, elements: Sequence[Add]) -> int:
        begin_ns = time.perf_counter_ns()
        messages = [
            element_message(NFT_MSG_NEWSETELEM, name, [_as_pyroute2(add) for add in group])
            for name, group in grouped(elements)
        ]
        async for _ in self._nft.nlm_request_batch(batch(messages)):
            pass
        return time.perf_counter_ns() - begin_ns


class CommandLineInstaller:
    """`nft -f -`, started inside the namespace.

    When the command exits, the kernel makes it wait until what was deleted earlier is freed: an RCU
    grace period, some 10 ms. The deletions between our measurements are not its own, so that this
    is waited for beforehand.
    """

    def __init__(self, netns_path: str, binary: str) -> None:
        self._path = netns_path
        self._command = [binary, "-f", "-"]

    def install(self, elements: Sequence[Add]) -> int:
        """Run the command; writing its input is not counted, starting it is."""
        text = "".join(
            f"add element inet {TABLE} {name} {{ {', '.join(map(_as_text, group))} }}\n"
            for name, group in grouped(elements)
        )

        NftSocket(self._path, in_place_renewal=True).close()  # waits, as the command would

        def run() -> int:
            begin_ns = time.perf_counter_ns()
            result = subprocess.run(
                self._command, input=text.encode(), capture_output=True, check=False
            )
            took_ns = time.perf_counter_ns() - begin_ns
            if result.returncode:
                raise UserError(f"nft failed: {result.stderr.decode(errors='replace').strip()}")
            return took_ns

        return in_namespace(self._path, run)

    def close(self) -> None:
        """Nothing is open between calls."""


def grouped(elements: Sequence[Add]) -> list[tuple[str, list[Add]]]:
    """Return the elements by set, in lists that fit a netlink attribute."""
    by_set: dict[str, list[Add]] = {}
    for add in elements:
        by_set.setdefault(add.set_name, []).append(add)
    return [
        (name, adds[start : start + MAX_ELEMENTS])
        for name, adds in by_set.items()
        for start in range(0, len(adds), MAX_ELEMENTS)
    ]


def _as_pyroute2(add: Add) -> dict[str, Any]:
    attributes = [key_attribute(add.key)]
    if add.data:
        attributes.append(("NFTA_SET_ELEM_DATA", {"attrs": [("NFTA_DATA_VALUE", add.data)]}))
    attributes.append(("NFTA_SET_ELEM_TIMEOUT", add.timeout_ms))
    comment = [("NFTNL_UDATA_SET_ELEM_COMMENT", add.comment)]
    attributes.append(("NFTA_SET_ELEM_USERDATA", comment))
    return {"attrs": attributes}


def _as_text(add: Add) -> str:
    size = 4 if add.set_name.endswith("4") else 16
    key = f"{ip_address(add.key[:size])} . {ip_address(add.key[size : 2 * size])}"
    port = add.key[2 * size :]
    if port:
        key += f' . "{port.rstrip(bytes(1)).decode()}"'
    text = f'{key} timeout {add.timeout_ms}ms comment "{add.comment.decode()}"'
    match add.set_name[:-1]:
        case "steer":
            text += f" : {_number(add.data):#x}"
        case "qos":
            class_id, dscp = Marking.decode(add.data)
            text += f" : {class_id >> 16:x}:{class_id & 0xFFFF:x} . {dscp:#x}"
    return text


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
