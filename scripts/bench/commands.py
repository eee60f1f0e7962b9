"""The group `aipaging bench`."""

import click

from scripts.cli import LazyGroup

COMMANDS = {
    "install": (
        "scripts.bench.install:command",
        "One COMMIT into the kernel: packed, pyroute2, nft command.",
    ),
    "forwarding": (
        "scripts.bench.forwarding:command",
        "Packets per second: steered against plain forwarding.",
    ),
}


@click.group(cls=LazyGroup, commands_at=COMMANDS)
def group() -> None:
    """Measure what the gate costs, in network namespaces of its own.

    Every comparison is between arms interleaved in one run: believe the ratios, and compare
    absolute figures only with those of the same machine.
    """
