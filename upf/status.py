"""What a user plane says of itself, for people and their programs."""

import contextlib
from collections.abc import Iterable
from typing import Any

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_INET

from controlplane.enforcement import Enforced
from upf.config import GateConfig
from upf.fastpath import FastPath, FastPathError, ports
from upf.gate import fingerprint
from upf.leases import enforced_leases
from upf.nft_socket import NftSocket
from upf.readback import drop_counters, table_comments


def leases(enforced: Iterable[Enforced]) -> list[dict[str, Any]]:
    """Return live leases by flow, in the words of the control plane's API."""
    return [
        {
            "leaseId": entry.lease_id,
            "epoch": entry.epoch,
            "ue": str(entry.flow.ue),
            "serviceAddress": str(entry.flow.service),
            "anchor": entry.anchor,
            "remainingMs": entry.remaining_ms,
            "uplinkPackets": entry.usage.uplink_packets,
            "uplinkBytes": entry.usage.uplink_bytes,
            "downlinkPackets": entry.usage.downlink_packets,
            "downlinkBytes": entry.usage.downlink_bytes,
        }
        for entry in enforced
    ]


def of_kernel(netns_path: str, config: GateConfig) -> dict[str, Any]:
    """Return leases and drops as the kernel has them, where no process of ours holds them.

    `table`: its comment, None if there is none. Of the table of another version or configuration
    no lease can be read: `enforced` is None.
    """
    with contextlib.closing(NftSocket(netns_path, in_place_renewal=False)) as handle:
        table = table_comments(handle).get(NFPROTO_INET)
        enforced = _enforced(handle, netns_path, config, table)
        return {
            "table": table,
            "enforced": None if enforced is None else leases(enforced),
            "drops": {} if table is None else drop_counters(handle),
        }


def _enforced(
    handle: NftSocket, netns_path: str, config: GateConfig, table: str | None
) -> list[Enforced] | None:
    if table == fingerprint(config, None):
        return enforced_leases(handle, config, None)
    try:
        there = ports(netns_path, config)
    except FastPathError:  # an interface is not there
        return None
    if table is None or table != fingerprint(config, there):
        return None
    fast_path = FastPath.adopt(netns_path, there, table)
    if fast_path is None:
        return enforced_leases(handle, config, None)
    with contextlib.closing(fast_path):
        return enforced_leases(handle, config, fast_path)
