"""The group `aipaging bench`."""

import click

from scripts.cli import LazyGroup

COMMANDS = {
    "install": (
        "scripts.bench.install:command",
        "One COMMIT into the kernel: packed, pyroute2, nft command.",
    ),
    "control": (
        "scripts.bench.control:command",
        "Pages over HTTP and in process, evidence, memory.",
    ),
    "forwarding": (
        "scripts.bench.forwarding:command",
        "Packets per second: steered against plain forwarding.",
    ),
}


@click.group(cls=LazyGroup, commands_at=COMMANDS)
def group() -> None:
    """Measure what gate and control plane cost, in network namespaces of their own.

    Every comparison is between arms interleaved in one run: believe the ratios, and compare
    absolute figures only with those of the same machine.
    """
