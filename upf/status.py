"""What the kernel says of a user plane that no process of ours holds."""

import contextlib
from typing import Any

from upf.config import GateConfig
from upf.leases import enforced_leases
from upf.nft_socket import NftSocket
from upf.readback import drop_counters, table_comment
from upf.schema import Schema


def fingerprint(config: GateConfig) -> str:
    """Return what the comment of the gate's table is, if it was made by this version."""
    return Schema(config).fingerprint()


def of_kernel(netns_path: str, config: GateConfig) -> dict[str, Any]:
    """Return leases and drops as they are in the kernel now.

    `table`: its fingerprint, None if there is none. Of another version's or configuration's table
    no lease can be read: `enforced` is None.
    """
    with contextlib.closing(NftSocket(netns_path, in_place_renewal=False)) as handle:
        table = table_comment(handle)
        ours = table == fingerprint(config)
        return {
            "table": table,
            "enforced": enforced_leases(handle, config) if ours else None,
            "drops": {} if table is None else drop_counters(handle),
        }
