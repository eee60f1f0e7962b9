"""What an emulated network tells the control plane."""

import pytest
from fakes import catalogue

from scripts.testbed_config import with_n6_capacity
from topologies.spec import AnchorSpec

MBPS = 1_000_000


@pytest.mark.parametrize(
    ("rate_mbps", "given_bps", "expected_bps"),
    [(None, None, None), (None, 7, 7), (5, None, 5 * MBPS), (5, 7, 7), (5, 9 * MBPS, 5 * MBPS)],
)
def test_no_more_is_guaranteed_to_an_anchor_than_its_link_has(
    rate_mbps: float | None, given_bps: int | None, expected_bps: int | None
) -> None:
    given = catalogue()
    edge1 = given.anchor("edge1").model_copy(update={"n6_uplink_bps": given_bps})
    given = given.model_copy(update={"anchors": [edge1, *given.anchors[1:]]})
    limited = with_n6_capacity(given, [AnchorSpec(name="edge1", rate_mbps=rate_mbps)])
    assert limited.anchor("edge1").n6_uplink_bps == expected_bps
    assert limited.anchor("edge2") == given.anchor("edge2")
    assert limited.services == given.services
