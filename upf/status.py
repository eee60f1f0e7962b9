"""What the kernel says of a user plane that no process of ours holds."""

import contextlib
from typing import Any

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_INET

from upf.config import GateConfig
from upf.fastpath import FastPathError, ports
from upf.gate import fingerprint
from upf.leases import enforced_leases
from upf.nft_socket import NftSocket
from upf.readback import drop_counters, table_comments


def of_kernel(netns_path: str, config: GateConfig) -> dict[str, Any]:
    """Return leases and drops as they are in the kernel now.

    `table`: its comment, None if there is none. Of the table of another version or configuration
    no lease can be read: `enforced` is None.
    """
    with contextlib.closing(NftSocket(netns_path, in_place_renewal=False)) as handle:
        table = table_comments(handle).get(NFPROTO_INET)
        possible = [fingerprint(config, None)]
        with contextlib.suppress(FastPathError):  # an interface is not there
            possible.append(fingerprint(config, ports(netns_path, config)))
        return {
            "table": table,
            "enforced": enforced_leases(handle, config) if table in possible else None,
            "drops": {} if table is None else drop_counters(handle),
        }
