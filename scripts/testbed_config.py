"""An emulated network as the control plane is told of it."""

import math
from pathlib import Path

from controlplane.controller import Settings
from controlplane.parties import Subscriber
from scripts.serve import CellConfig, ServeConfig
from topologies.network import Network
from upf.config import AnchorPort

CONTROL_PORT = 8080


def serve_config(
    network: Network,
    *,
    catalogue: Path,
    state: Path,
    operator_socket: Path,
    settings: Settings,
    failure_detection_ms: int,
    in_place_renewal: bool,
) -> ServeConfig:
    """Describe an emulated network to the control plane."""
    cells = {}
    for gnb in network.gnbs.values():
        # The UPF queues where the cell would: its N3 interfaces are no faster than the cell.
        n3 = gnb.spec.n3.rate_mbps or math.inf
        cells[gnb.name] = CellConfig(
            n3_interface=gnb.upf_interface,
            downlink_mbps=min(gnb.spec.downlink_mbps, n3),
            uplink_mbps=min(gnb.spec.uplink_mbps, n3),
        )
    return ServeConfig(
        upf_netns=network.upf.netns,
        in_place_renewal=in_place_renewal,
        catalogue=catalogue,
        state=state,
        operator_socket=operator_socket,
        listen=(
            f"{network.core.address4}:{CONTROL_PORT}",
            f"[{network.core.address6}]:{CONTROL_PORT}",
        ),
        cells=cells,
        anchors=tuple(
            AnchorPort(
                name=anchor.name,
                interface=anchor.upf_interface,
                address4=anchor.address4,
                address6=anchor.address6,
            )
            for anchor in network.anchors.values()
        ),
        subscribers=tuple(
            Subscriber(ue.name, ue.address4, ue.address6, ue.serving_gnb) for ue in network.ues
        ),
        settings=settings,
        failure_detection_ms=failure_detection_ms,
        api_root=f"http://{network.core.address4}:{CONTROL_PORT}",
        allow_http_sinks=True,
    )
