"""Programs of ours at tc ingress (tcx, Linux 6.6) of one network namespace's interfaces.

tcx needs no qdisc, which stops an interface for some milliseconds when it comes or goes. Others'
programs may be there too; ours have names of their own and hand on what they leave.
"""

import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from upf import libbpf
from upf.libbpf import Program
from upf.netns import in_namespace

OURS = "aipaging_"  # what their names begin with


def attach(netns_path: str, programs: Mapping[int, Program]) -> None:
    """Attach a program to each interface (its index). Raises BpfError."""

    def inside() -> None:
        for index, program in programs.items():
            program.attach(index)

    in_namespace(netns_path, inside)


@contextmanager
def attached(netns_path: str, indices: Iterable[int]) -> Iterator[list[tuple[int, Program]]]:
    """Open our programs on these interfaces, each with its interface. Raises BpfError."""
    with ExitStack() as opened:
        yield in_namespace(netns_path, lambda: _ours(indices, opened))


def detach(netns_path: str) -> None:
    """Take every program of ours away. Raises BpfError."""

    def inside() -> None:
        with ExitStack() as opened:
            indices = [number for number, _ in socket.if_nameindex()]
            for index, program in _ours(indices, opened):
                program.detach(index)

    in_namespace(netns_path, inside)


def _ours(indices: Iterable[int], opened: ExitStack) -> list[tuple[int, Program]]:
    found = []
    for index in indices:
        for program in libbpf.attached(index):
            opened.callback(program.close)
            if program.name.startswith(OURS):
                found.append((index, program))
    return found
