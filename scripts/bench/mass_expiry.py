"""Many leases that end in the same instant, beside others that carry traffic.

What must hold: no packet of an ended lease arrives after its deadline, and none of another lease
is lost while the kernel takes the ended ones away.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from controlplane.enforcement import Binding, Install, Revoke
from scripts.bench import common
from scripts.bench.chain import LEASE_TTL_NS, Chain, install
from scripts.bench.lease_traffic import LeaseTraffic, Record
from scripts.errors import UserError
from upf.features import Features

METHOD = """\
One UPF with the real gate, as in `forwarding`; leases of one family (IPv4), every second of them
with one and the same deadline, installed in batches of so few that no batch is timed to end more
than 1 ms early for its size. 64-byte UDP goes uplink through all leases in turn, the ending and the
others alternating, from before the deadline until after it, in bursts of 16 with their send time;
the anchor's socket holds all of it, with the kernel's receive stamps. overrun_packets: packets of
ending leases received after the deadline. lost: packets of the other leases that were sent and
never received. early_ms: from the first packet of an ending lease that was refused to the deadline.
Controls, in a run of their own after the measured ones: elements that live 50 ms longer than the
deadline that is claimed must show as overruns, and one of the other leases revoked at the deadline
must show as loss; else the measurement is blind, and says so."""

BATCH_LEASES = 10
CONTROL_LATE_NS = 50_000_000
TRIES = 5


class MassExpiry:
    """A chain with leases of which every second one ends with the others of its kind."""

    def __init__(
        self, leases: int, rate_pps: int, lead_s: float, features: Features, undo: ExitStack
    ) -> None:
        self._chain = Chain(leases=leases, features=features)
        undo.callback(self._chain.close)
        self._traffic = LeaseTraffic(self._chain, leases, rate_pps)
        undo.callback(self._traffic.close)
        self._epoch = 0
        self._lead_ns = int(lead_s * 1e9)  # of traffic before the deadline, and after it
        self._install_ns = self._lead_ns

    def run(self, *, late_ns: int = 0, revoke_other: bool = False) -> dict[str, Any]:
        """Let half of the leases end once; return the figures of it.

        `late_ns`: how much later than claimed they end; `revoke_other`: end one that should not.
        """
        gate = self._chain.gate
        assert gate is not None
        for _ in range(TRIES):
            self._epoch += 1
            leases = self._chain.bindings(
                (4,), expires_ns=time.monotonic_ns() + LEASE_TTL_NS, epoch=self._epoch
            )
            others, ending = leases[::2], leases[1::2]
            install(gate, others)
            deadline_ns = time.monotonic_ns() + self._lead_ns + self._install_ns
            self._end_at(ending, deadline_ns + late_ns)
            if time.monotonic_ns() < deadline_ns - self._lead_ns:
                break
            self._install_ns *= 2  # installing them took longer than was allowed for
        else:
            raise UserError("this machine is too slow to install the leases before they end")
        time.sleep(max(0, deadline_ns - self._lead_ns - time.monotonic_ns()) / 1e9)
        victim = others[len(others) // 2]
        record = self._traffic.run(
            deadline_ns + self._lead_ns,
            deadline_ns,
            lambda: gate.apply([Revoke(victim)] if revoke_other else []),
        )
        return _figures(record, deadline_ns)

    def _end_at(self, leases: list[Binding], expires_ns: int) -> None:
        gate = self._chain.gate
        assert gate is not None
        for start in range(0, len(leases), BATCH_LEASES):
            some = leases[start : start + BATCH_LEASES]
            gate.apply([Install(replace(lease, expires_ns=expires_ns)) for lease in some])


def _figures(record: Record, deadline_ns: int) -> dict[str, Any]:
    ending_ns, others_lost = record.receive_ns[:, 1::2], record.lost[:, ::2]
    late = ending_ns[ending_ns > deadline_ns]
    refused_ns = record.send_ns[:, 1::2][record.lost[:, 1::2]]
    in_time = int(np.count_nonzero(ending_ns)) - late.size
    return {
        "lost": int(np.count_nonzero(others_lost)),
        "others_sent": int(np.count_nonzero(record.sent[:, ::2])),
        "overrun_packets": int(late.size),
        "overrun_ms": float((late.max(initial=deadline_ns) - deadline_ns) / 1e6),
        "ending_received_in_time": in_time,
        "ending_refused": int(refused_ns.size),
        "early_ms": float((deadline_ns - refused_ns.min(initial=deadline_ns)) / 1e6),
    }


def measure(
    *,
    leases: int,
    rate_pps: int,
    repeats: int,
    lead_s: float,
    features: Features,
) -> dict[str, Any]:
    """Let `leases` // 2 end at once beside as many others, `repeats` times, and the controls."""
    common.allow_many_files()
    with ExitStack() as undo:
        expiry = MassExpiry(leases, rate_pps, lead_s, features, undo)
        runs = []
        for number in common.steps("mass expiry", repeats + 1):
            if number < repeats:
                runs.append(expiry.run())
            else:
                control = expiry.run(late_ns=CONTROL_LATE_NS, revoke_other=True)
    return {
        "lost": sum(run["lost"] for run in runs),
        "overrun_packets": sum(run["overrun_packets"] for run in runs),
        "overrun_ms": max(run["overrun_ms"] for run in runs),
        "early_ms": max(run["early_ms"] for run in runs),
        "ending_leases": leases // 2,
        "other_leases": leases - leases // 2,
        "families": "ipv4",
        "rate_pps": rate_pps,
        "runs": runs,
        "controls": {
            "late_by_50_ms": {"overrun_packets": control["overrun_packets"]},
            "other_lease_revoked": {"lost": control["lost"]},
        },
        "blind": not (control["overrun_packets"] and control["lost"]),
        "method": METHOD,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    controls = figures["controls"]
    rows = [
        ("others: packets lost", f"{figures['lost']:,}"),
        ("... of sent", f"{sum(run['others_sent'] for run in figures['runs']):,}"),
        ("ending: packets after the deadline", f"{figures['overrun_packets']:,}"),
        ("ending: refused", f"{sum(run['ending_refused'] for run in figures['runs']):,}"),
        ("first refused before the deadline by, ms", f"{figures['early_ms']:.2f}"),
        ("control: 50 ms late, overruns", f"{controls['late_by_50_ms']['overrun_packets']:,}"),
        ("control: other lease revoked, lost", f"{controls['other_lease_revoked']['lost']:,}"),
    ]
    title = f"{figures['ending_leases']:,} leases end beside {figures['other_leases']:,} others"
    caption = "blind: a control was not seen" if figures["blind"] else ""
    common.print_table(title, ("figure", "value"), rows, caption)
