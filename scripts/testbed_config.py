"""An emulated network as the control plane is told of it."""

import math
from collections.abc import Iterable
from pathlib import Path

from controlplane.catalogue import Anchor, Catalogue
from controlplane.controller import Settings
from controlplane.intent import Intent
from controlplane.parties import Subscriber, Subscription
from scripts.serve import ServeConfig
from scripts.user_plane import CellConfig, GnbConfig
from topologies.network import Network
from topologies.spec import AnchorSpec
from upf.config import AnchorPort
from upf.features import Features

CONTROL_PORT = 8080


def with_n6_capacity(catalogue: Catalogue, anchors: Iterable[AnchorSpec]) -> Catalogue:
    """Return the catalogue with no more for guaranteed rates than each anchor's link has."""
    rates = {anchor.name: anchor.rate_mbps for anchor in anchors}

    def limited(anchor: Anchor) -> Anchor:
        rate_mbps = rates.get(anchor.name)
        if rate_mbps is None:
            return anchor
        link_bps = int(rate_mbps * 1_000_000)
        return anchor.model_copy(
            update={
                "n6_downlink_bps": min(anchor.n6_downlink_bps or link_bps, link_bps),
                "n6_uplink_bps": min(anchor.n6_uplink_bps or link_bps, link_bps),
            }
        )

    described = catalogue.model_dump() | {"anchors": [limited(one) for one in catalogue.anchors]}
    return Catalogue.model_validate(described)


def subscriptions(catalogue: Catalogue) -> tuple[Subscription, ...]:
    """Return one subscription to each service, with the plainest intent."""
    return tuple(
        Subscription(service.aisi, Intent(task=service.task)) for service in catalogue.services
    )


def serve_config(
    network: Network,
    *,
    catalogue: Path,
    state: Path,
    operator_socket: Path,
    settings: Settings,
    failure_detection_ms: int,
    features: Features,
    subscriptions: tuple[Subscription, ...],
) -> ServeConfig:
    """Describe an emulated network to the control plane; every UE has the subscriptions."""
    cells = {}
    for gnb in network.gnbs.values():
        # Downlink packets wait at the UPF, or at the cell: both have as much capacity, and classes.
        n3 = gnb.spec.n3.rate_mbps or math.inf
        cells[gnb.name] = CellConfig(
            n3_interface=gnb.upf_interface,
            downlink_mbps=min(gnb.spec.downlink_mbps, n3),
            uplink_mbps=min(gnb.spec.uplink_mbps, n3),
            gnb=GnbConfig(netns=gnb.netns, cell_interface="cell", n3_interface="n3"),
        )
    return ServeConfig(
        upf_netns=network.upf.netns,
        in_place_renewal=features.in_place_renewal,
        fast_path=features.tc_bpf,
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
            Subscriber(
                *(ue.name, ue.address4, ue.address6, ue.serving_gnb), subscriptions=subscriptions
            )
            for ue in network.ues
        ),
        settings=settings,
        failure_detection_ms=failure_detection_ms,
        api_root=f"http://{network.core.address4}:{CONTROL_PORT}",
        allow_http_sinks=True,
    )
