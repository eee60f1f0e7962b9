"""Programs of ours at tc ingress (tcx, Linux 6.6) of one network namespace's interfaces.

tcx needs no qdisc, which stops an interface for some milliseconds when it comes or goes. Others'
programs may be there too; ours have names of their own and hand on what they leave.
"""

import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

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


def attached(netns_path: str, indices: Iterable[int]) -> dict[int, Program]:
    """Open our programs on these interfaces; the caller closes them. Raises BpfError."""
    return in_namespace(netns_path, lambda: _ours(indices))


def detach(netns_path: str) -> None:
    """Take every program of ours away. Raises BpfError."""

    def inside() -> None:
        with ExitStack() as opened:
            for index, program in _ours(number for number, _ in socket.if_nameindex()).items():
                opened.callback(program.close)
                program.detach(index)

    in_namespace(netns_path, inside)


def _ours(indices: Iterable[int]) -> dict[int, Program]:
    found: dict[int, Program] = {}
    for index in indices:
        for program in libbpf.attached(index):
            if program.name.startswith(OURS) and index not in found:
                found[index] = program
            else:
                program.close()
    return found
