"""The group `aipaging bench`."""

import click

from scripts.cli import LazyGroup

COMMANDS = {
    "user-plane": (
        "scripts.bench.user_plane:command",
        "Leases at scale; relocation beside nft, ip route, Open vSwitch, HAProxy, DNS.",
    ),
    "control": (
        "scripts.bench.control:command",
        "Pages over HTTP and in process, evidence, memory.",
    ),
    "waiting": (
        "scripts.bench.waiting:command",
        "First packets, and an uplink that waits for its target.",
    ),
}


@click.group(cls=LazyGroup, commands_at=COMMANDS)
def group() -> None:
    """Measure what gate and control plane cost, in network namespaces of their own.

    Every comparison is between arms interleaved in one run: believe the ratios, and compare
    absolute figures only with those of the same machine.
    """
