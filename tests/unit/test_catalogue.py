"""A catalogue is consistent when it is used, and a mistake in it is named with its line."""

from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from controlplane.catalogue import Catalogue, load_catalogue, profile_for
from controlplane.configfile import ConfigError, parse_yaml
from controlplane.enforcement import Flow
from controlplane.intent import Intent
from controlplane.resolver import AnchorState, AnchorView, resolve

BUILT_IN = Path(__file__).parents[2] / "topologies" / "catalogue.yaml"
GOOD = """\
qos_profiles:
  - name: QOS_E
    five_qi: 80
  - name: QOS_S
    five_qi: 80
services:
  - aisi: chat
    task: text-generation
    model: m
    address4: 198.18.0.1
    address6: fd00:a151::1
  - aisi: ears
    task: automatic-speech-recognition
    model: m
    address4: 198.19.255.254
    address6: fd00:a151::2
anchors:
  - name: edge1
    region: north
    trust_tier: 3
    slots: 64
    cost: 2.0
    hosts:
      - aisi: chat
        service_time_ms: 20
  - name: edge2
    region: north
    trust_tier: 3
    slots: 64
    cost: 2.0
    hosts:
      - aisi: ears
        service_time_ms: 20
"""


def test_built_in_catalogue_serves_the_default_intent() -> None:
    catalogue = load_catalogue(BUILT_IN)
    views = [AnchorView(a, 0, AnchorState.UP, 0.0, None, None) for a in catalogue.anchors]
    resolution = resolve(catalogue, Intent(task="text-generation"), views)
    assert [c.anchor.name for c in resolution.candidates] == ["edge1", "edge2", "cloud"]
    assert profile_for(catalogue, Intent(task="text-generation")) == catalogue.profile("QOS_E")


def test_rates_choose_the_smallest_profile_that_guarantees_them() -> None:
    catalogue = load_catalogue(BUILT_IN)

    def chosen(**members: Any) -> str | None:
        intent = Intent.model_validate({"task": "text-generation", **members})
        profile = profile_for(catalogue, intent)
        return None if profile is None else profile.name

    assert chosen(requiredRates={"downlinkBps": 2_000_000}) == "QOS_E"
    assert chosen(requiredRates={"downlinkBps": 2_000_001}) == "QOS_L"
    assert chosen(requiredRates={"uplinkBps": 600_000}) is None
    assert chosen(qosProfile="BEST_EFFORT") == "BEST_EFFORT"
    assert chosen(qosProfile="NO_SUCH") is None


@pytest.mark.parametrize(
    ("was", "becomes", "words"),
    [
        ("memory_mb: 2000", "memory_mb: 32000", "whose model tokens-1 needs 32000 MB of memory"),
        ("memory_mb: 2000", "accelerators: [gpu]", "needs gpu, which it has not"),
        ("model: tokens-1", "model: tokens-2", "runs tokens-2, which is no model"),
        ("provider: operator", "provider: guest", "is of guest, which is no provider"),
    ],
)
def test_anchors_must_satisfy_what_models_require(was: str, becomes: str, words: str) -> None:
    text = BUILT_IN.read_text().replace(
        "# memory_mb: 16000 ", "provider: operator\n    memory_mb: 16000 #"
    )
    with pytest.raises(ConfigError, match=words):
        parse_yaml(text.replace(was, becomes, 1), Catalogue, "c.yaml")


def test_what_a_catalogue_tells() -> None:
    catalogue = parse_yaml(GOOD, Catalogue, "c.yaml")
    assert catalogue.shared_five_qis == {80: 68}
    chat, edge1 = catalogue.service("chat"), catalogue.anchor("edge1")
    hosting = edge1.hosting("chat")
    assert hosting is not None
    assert (chat.port, edge1.path_rtt_ms, hosting.service_time_ms) == (8000, 0, 20)
    assert edge1.hosting("ears") is None
    ue4, ue6 = ip_address("10.45.0.1"), ip_address("fd00:45::1")
    assert chat.flows(ue4, ue6) == (Flow(ue4, chat.address4), Flow(ue6, chat.address6))
    for missing in (catalogue.service, catalogue.anchor):
        with pytest.raises(KeyError, match="absent"):
            missing("absent")


@pytest.mark.parametrize(
    ("was", "becomes", "line", "words"),
    [
        ("address4: 198.18.0.1", "address4: 192.0.2.1", 7, "192.0.2.1 is not in 198.18.0.0/15"),
        ("fd00:a151::1", "fd00:45::1", 7, "address6 fd00:45::1 is not in fd00:a151::/64"),
        ("address4: 198.18.0.1", "address4: 198.18.0.256", 10, "services.0.address4"),
        ("task: text-generation", "task: Text Generation", 8, "services.0.task"),
        ("    model: m\n    address4: 198.18", "    address4: 198.18", 7, "model is missing"),
        ("slots: 64", "slots: 0", 21, "anchors.0.slots"),
        ("slots: 64", "slots: many", 21, "anchors.0.slots"),
        ("cost: 2.0", "cost: -1", 22, "anchors.0.cost"),
        ("trust_tier: 3", "trust_tier: 11", 20, "anchors.0.trust_tier"),
        ("service_time_ms: 20", "service_time_ms: 0", 25, "anchors.0.hosts.0.service_time_ms"),
        ("region: north", "region: far north", 19, "anchors.0.region"),
        ("region: north", "region: north\n    color: red", 20, "unknown key anchors.0.color"),
        ("five_qi: 80", "five_qi: 81", 2, "five_qi 81 is not standardised; there are 1, 2"),
        ("five_qi: 80", "five_qi: 4", 2, "5QI 4 is of type GBR: give guaranteed_downlink_bps"),
        ("five_qi: 80", "guaranteed_uplink_bps: 1", 2, "5QI 9 is of type Non-GBR: it guaran"),
        ("five_qi: 80", "five_qi: 80\n    max_uplink_bps: 1", 2, "(MFBR) are for GBR ones"),
        ("name: QOS_S", "name: QOS_E", 1, "QoS profile QOS_E is given twice"),
        ("aisi: ears\n    task", "aisi: chat\n    task", 1, "AISI chat is given twice"),
        ("name: edge2", "name: edge1", 1, "anchor edge1 is given twice"),
        ("198.19.255.254", "198.18.0.1", 1, "service address 198.18.0.1 is given twice"),
        ("fd00:a151::2", "fd00:a151:0::1", 1, "service address fd00:a151::1 is given twice"),
        ("      - aisi: ears", "      - aisi: eyes", 1, "anchor edge2 hosts eyes"),
    ],
)
def test_a_mistake_is_named_with_its_line(was: str, becomes: str, line: int, words: str) -> None:
    text = GOOD.replace(was, becomes, 1)
    assert text != GOOD
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, Catalogue, "c.yaml")
    (complaint,) = str(caught.value).splitlines()
    assert complaint.startswith(f"c.yaml:{line}: ")
    assert words in complaint


def test_a_catalogue_that_offers_nothing_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml("qos_profiles: []\nservices: []\nanchors: []\n", Catalogue, "c.yaml")
    named = [line.split(": ")[:2] for line in str(caught.value).splitlines()]
    assert named == [
        ["c.yaml:1", "qos_profiles"],
        ["c.yaml:2", "services"],
    ]
