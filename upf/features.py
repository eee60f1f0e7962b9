"""What this kernel can do for the user plane: found by trying, never by reading its configuration.

The trying is `upf.feature_probes`, in a child process and a network namespace of its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from upf.config import PacketQueue, QueueBy

PROBE_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What was found. A feature that could not be tried counts as absent; `reasons` says why."""

    kernel: str  # release, as uname gives it
    netns: bool = False  # new network namespaces (CAP_SYS_ADMIN)
    mount_pid_ns: bool = False  # new mount and PID namespaces (CAP_SYS_ADMIN)
    net_admin: bool = False  # links may be changed (CAP_NET_ADMIN)
    veth: bool = False
    bridge: bool = False
    ipv6: bool = False
    policy_routing: bool = False  # route table by firewall mark, IPv4
    policy_routing6: bool = False  # the same, IPv6
    htb: bool = False
    netem: bool = False
    nft_inet: bool = False  # nf_tables, `inet` family
    nft_bridge: bool = False  # nf_tables, `bridge` family
    timeout_map: bool = False  # map whose elements have a timeout and a counter
    in_place_renewal: bool = False  # adding an element that exists renews its timeout (6.12)
    tc_bpf: bool = False  # the fast path's programs at tc ingress (tcx, Linux 6.6)
    conntrack: bool = False  # `ct state` in a rule
    ct_mark: bool = False  # `ct mark` read and set in a rule
    nft_queue: bool = False  # nf_tables' own `queue` expression
    nfqueue_target: bool = False  # the xtables target NFQUEUE in an nf_tables rule (nft_compat)
    nft_reject: bool = False  # `reject` in the `inet` family
    nfqueue: bool = False  # packet queues of user space (nfnetlink_queue), and their library
    so_timestampns: bool = False
    so_rxq_ovfl: bool = False
    so_rcvbufforce: bool = False
    packet_vnet_hdr: bool = False
    reasons: dict[str, str] = field(default_factory=dict)  # feature -> why it is absent

    def packet_queue(self) -> PacketQueue | None:
        """Return how packets can wait for user space here; None: they cannot."""
        if not self.nfqueue or not (self.nft_queue or self.nfqueue_target):
            return None
        by = QueueBy.EXPRESSION if self.nft_queue else QueueBy.TARGET
        return PacketQueue(by=by, reject=self.nft_reject)

    def to_json(self) -> dict[str, Any]:
        """The features as plain JSON types, for a manifest."""
        return asdict(self)


def probe() -> Features:
    """Try every feature; takes about half a second. Never raises and leaves nothing behind."""
    command = [sys.executable, "-m", "upf.feature_probes"]
    try:
        child = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=True)
        return Features(**json.loads(child.stdout))
    except subprocess.CalledProcessError as error:
        why = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        why = str(error)
    return Features(kernel=os.uname().release, reasons={"netns": f"the probe failed: {why}"})
