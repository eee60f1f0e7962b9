from pathlib import Path

import pytest

from controlplane.configfile import ConfigError, parse_yaml
from topologies import addressing
from topologies.spec import BUILTIN, TopologySpec, load_topology, resolve

GOOD = """\
name: small
ues:
  count: 3
gnbs:
  - name: gnb1
    downlink_mbps: 100
    uplink_mbps: 50
anchors:
  - name: edge1
"""


def parse(text: str) -> TopologySpec:
    return parse_yaml(text, TopologySpec, "t.yaml")


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def test_defaults_are_no_delay_and_no_rate() -> None:
    spec = parse(GOOD)
    assert spec.ues.count == 3
    assert spec.gnbs[0].radio.delay_ms == spec.gnbs[0].n3.delay_ms == spec.core.delay_ms == 0
    assert spec.gnbs[0].n3.rate_mbps is None
    assert spec.anchors[0].rate_mbps is None


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("count: 3", "count: 0", "t.yaml:3: ", "ues.count"),
        ("count: 3", "count: 251", "t.yaml:3: ", "less than or equal to 250"),
        ("count: 3", "number: 3", "t.yaml:3: ", "unknown key ues.number"),
        ("downlink_mbps: 100", "downlink_mbps: 0", "t.yaml:6: ", "downlink_mbps"),
        ("downlink_mbps: 100", "downlink_mbps: .inf", "t.yaml:6: ", "downlink_mbps"),
        ("    uplink_mbps: 50\n", "", "t.yaml:5: ", "gnbs.0.uplink_mbps is missing"),
        ("uplink_mbps: 50", "uplink_mbps: 50\n    radio: {delay_ms: -1}", "t.yaml:8: ", "delay_ms"),
        ("name: edge1", "name: edge1\n    delay_ms: 1001", "t.yaml:10: ", "less than or equal"),
        ("name: edge1", "name: gnb1", "t.yaml:9: ", "two nodes of this name"),
        ("name: edge1", "name: Edge 1", "t.yaml:9: ", "lower-case"),
        ("name: edge1", "name: ue7", "t.yaml:9: ", "taken"),
        ("name: edge1", "name: core", "t.yaml:9: ", "taken"),
        ("name: edge1", "name: thirteen-long", "t.yaml:9: ", "at most 12"),
        ("name: gnb1", "name: gnb-number1", "t.yaml:5: ", "at most 9"),
        ("  - name: edge1\n", "  []\n", "t.yaml:8: ", "anchors"),
    ],
)
def test_impossible_values_are_named_with_file_and_line(
    old: str, new: str, where: str, what: str
) -> None:
    assert old in GOOD
    text = complaint(GOOD.replace(old, new))
    assert text.startswith(where)
    assert what in text


def test_a_network_needs_a_gnb() -> None:
    text = "name: x\ngnbs: []\nanchors:\n  - name: edge1\n"
    assert complaint(text).startswith("t.yaml:2: gnbs")


def test_builtin_topologies_are_found_by_name() -> None:
    near, far = (load_topology(name) for name in BUILTIN)
    assert [anchor.name for anchor in near.anchors] == ["edge1", "edge2", "cloud"]
    assert [anchor.delay_ms for anchor in near.anchors] == [0, 0, 20]
    assert [anchor.delay_ms for anchor in far.anchors] == [0, 10, 20]


def test_files_are_found_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    assert load_topology(file).name == "small"
    assert resolve(str(file)) == file


def test_what_is_neither_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="two-edge, two-edge-far"):
        resolve("three-edge")


def test_every_address_is_given_once() -> None:
    given = []
    for gnb in range(1, addressing.MAX_GNBS + 1):
        given += [addressing.n3_upf(gnb), addressing.n3_gnb(gnb), addressing.cell_gnb(gnb)]
        given += [addressing.cell_ue(gnb, ue) for ue in range(1, addressing.MAX_UES + 1)]
    for anchor in range(1, addressing.MAX_ANCHORS + 1):
        given += [addressing.n6_upf(anchor), addressing.n6_anchor(anchor)]
    given += [addressing.ue(ue) for ue in range(1, addressing.MAX_UES + 1)]
    given += [addressing.core(), addressing.core_upf()]
    assert len({pair.v4 for pair in given}) == len(given)
    assert len({pair.v6 for pair in given}) == len(given)


def test_link_local_follows_rfc_4291() -> None:
    assert str(addressing.link_local("34:56:78:9a:bc:de")) == "fe80::3656:78ff:fe9a:bcde"
