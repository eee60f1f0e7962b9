"""The 5QI table says what TS 23.501 says, and QoS flows say what the table does."""

import pytest

from controlplane.five_qi import (
    BEST_EFFORT,
    DSCPS,
    FIVE_QIS,
    Characteristics,
    ResourceType,
    qos_flow,
)


@pytest.mark.parametrize(
    ("five_qi", "row"),
    [
        (1, (ResourceType.GBR, 20, 100, 1e-2, None, 2_000)),
        (5, (ResourceType.NON_GBR, 10, 100, 1e-6, None, None)),
        (9, (ResourceType.NON_GBR, 90, 300, 1e-6, None, None)),
        (65, (ResourceType.GBR, 7, 75, 1e-2, None, 2_000)),
        (80, (ResourceType.NON_GBR, 68, 10, 1e-6, None, None)),
        (82, (ResourceType.DELAY_CRITICAL_GBR, 19, 10, 1e-4, 255, 2_000)),
        (86, (ResourceType.DELAY_CRITICAL_GBR, 18, 5, 1e-4, 1_354, 2_000)),
        (90, (ResourceType.DELAY_CRITICAL_GBR, 25, 20, 1e-4, 63_000, 2_000)),
    ],
)
def test_rows_of_the_specification(five_qi: int, row: tuple[object, ...]) -> None:
    assert FIVE_QIS[five_qi][:-1] == row


def test_the_table_has_the_values_of_release_18() -> None:
    assert sorted(FIVE_QIS) == [
        *range(1, 11),
        *(65, 66, 67, 69, 70, 71, 72, 73, 74, 76, 79, 80),
        *range(82, 91),
    ]


@pytest.mark.parametrize("characteristics", FIVE_QIS.values(), ids=map(str, FIVE_QIS))
def test_a_row_is_consistent_with_its_resource_type(characteristics: Characteristics) -> None:
    critical = characteristics.resource_type is ResourceType.DELAY_CRITICAL_GBR
    assert (characteristics.maximum_data_burst_volume_bytes is not None) is critical
    assert (characteristics.averaging_window_ms is not None) is characteristics.guaranteed
    assert 1 <= characteristics.priority_level <= 127
    assert 0 < characteristics.packet_error_rate < 1
    assert not critical or characteristics.packet_delay_budget_ms <= 30


def test_every_5qi_but_best_effort_is_marked() -> None:
    assert set(FIVE_QIS) - set(DSCPS) == {BEST_EFFORT, 10}
    assert all(0 < dscp < 64 for dscp in DSCPS.values())


def test_a_qos_flow_says_what_the_table_does() -> None:
    voice = qos_flow(1, 64_000, 64_000, None, 128_000)
    assert (voice.guaranteed, voice.delay_critical, voice.dscp) == (True, False, 46)
    assert (voice.guaranteed_downlink_bps, voice.max_uplink_bps) == (64_000, 128_000)
    assert qos_flow(82, 1, 0, None, None).delay_critical
    assert not qos_flow(BEST_EFFORT, 0, 0, None, None).dscp
    with pytest.raises(KeyError):
        qos_flow(75, 0, 0, None, None)
