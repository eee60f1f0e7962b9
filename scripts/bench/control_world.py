"""What `bench control` measures on: a user plane in a namespace, a catalogue, many UEs."""

from __future__ import annotations

import json
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from controlplane.catalogue import Catalogue
from controlplane.parties import Subscriber
from scripts.serve import ServeConfig
from scripts.user_plane import CellConfig
from upf.config import AnchorPort
from upf.netns import Namespace, connect

ANCHOR = "edge1"
N3, N6 = "n3", "n6"
N3_LINK = ("10.48.1.2/24", "10.48.1.1/24"), ("fd00:48:1::2/64", "fd00:48:1::1/64")
N6_LINK = ("10.47.1.1/24", "10.47.1.2/24"), ("fd00:47:1::1/64", "fd00:47:1::2/64")
SLOTS = 1_000_000
TASKS = ("text-generation", "summarization")  # a UE has one session with each
MAX_UES = 60_000
FIRST_UE4, FIRST_UE6 = IPv4Address("10.45.0.1"), IPv6Address("fd00:45::1")
# One anchor, heard once: nothing is to be detected while the processes share few cores.
FAILURE_DETECTION_MS = 60_000


def catalogue() -> Catalogue:
    """Return two services at one anchor that has room for all."""
    services = [
        {
            "aisi": f"bench.{task}",
            "task": task,
            "model": "m",
            "address4": f"198.18.0.{number}",
            "address6": f"fd00:a151::{number}",
        }
        for number, task in enumerate(TASKS, start=1)
    ]
    anchor = {
        "name": ANCHOR,
        "region": "north",
        "trust_tier": 3,
        "slots": SLOTS,
        "cost": 1.0,
        "hosts": [{"aisi": service["aisi"], "service_time_ms": 20.0} for service in services],
    }
    profile = {"name": "QOS_E", "five_qi": 80}
    return Catalogue.model_validate(
        {"qos_profiles": [profile], "services": services, "anchors": [anchor]}
    )


def subscribers(count: int) -> tuple[Subscriber, ...]:
    """Return that many UEs, all in one cell."""
    return tuple(
        Subscriber(f"ue{number}", FIRST_UE4 + number, FIRST_UE6 + number, "gnb1")
        for number in range(count)
    )


class World:
    """A namespace with the UPF's interfaces, and the configuration of a daemon over it."""

    def __init__(self, folder: Path, ues: int, undo: ExitStack) -> None:
        """`folder`: on a real disk, for catalogue and state."""
        upf, gnb, anchor = (undo.enter_context(Namespace()) for _ in range(3))
        connect(gnb, "n3-gnb", upf, N3, *N3_LINK)
        connect(upf, N6, anchor, "n6-anchor", *N6_LINK)
        listed = folder / "catalogue.json"
        listed.write_text(json.dumps(catalogue().model_dump(mode="json")))
        self.config = ServeConfig(
            catalogue=listed,
            state=folder / "state",
            cells={"gnb1": CellConfig(n3_interface=N3, downlink_mbps=10_000, uplink_mbps=10_000)},
            anchors=(
                AnchorPort(
                    name=ANCHOR,
                    interface=N6,
                    address4=IPv4Address("10.47.1.2"),
                    address6=IPv6Address("fd00:47:1::2"),
                ),
            ),
            subscribers=subscribers(ues),
            failure_detection_ms=FAILURE_DETECTION_MS,
            upf_netns=upf.path,
        )
