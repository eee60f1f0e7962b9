"""The verdict on an attempt to deliver: done, tried again and when, or given up."""

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.delivery import (
    Delivered,
    Delivery,
    GiveUp,
    Retry,
    RetryPolicy,
    SinkGone,
)
from controlplane.sink_http import Answer

NS = 1_000_000_000
MS = 1_000_000
START = 1_700_000_000 * NS


def waiting(attempts: int = 0) -> Delivery:
    return Delivery(
        delivery_id=1,
        sink="https://host/",
        credential=None,
        body=b"",
        created_unix_ns=START,
        attempts=attempts,
        not_before_unix_ns=0,
    )


@settings(deadline=None)
@given(
    status=st.integers(200, 599),
    attempts=st.integers(0, 10**6),
    age_ms=st.integers(0, 4_000_000),
    jitter=st.floats(0, 1, exclude_max=True),
    retry_after_s=st.none() | st.integers(0, 10_000),
)
def test_retries_are_bounded_and_never_sooner_than_asked(
    status: int, attempts: int, age_ms: int, jitter: float, retry_after_s: int | None
) -> None:
    policy = RetryPolicy()
    now = START + age_ms * MS
    headers = httpx.Headers({} if retry_after_s is None else {"retry-after": str(retry_after_s)})
    verdict = policy.judge(waiting(attempts), Answer(status, headers, b""), now, jitter)

    asked_ns = (retry_after_s or 0) * NS
    longest_ns = min(policy.first_delay_ms * 2 ** min(attempts, 40), policy.max_delay_ms) * MS
    last_ns = START + policy.max_age_s * NS
    if 200 <= status < 300:
        assert verdict == Delivered()
    elif status == 410:
        assert verdict == SinkGone()
    elif status not in (408, 429) and status < 500:
        assert verdict == GiveUp(f"HTTP {status}")
    elif isinstance(verdict, Retry):
        delay_ns = verdict.not_before_unix_ns - now
        assert max(asked_ns, longest_ns // 2) <= delay_ns <= max(asked_ns, longest_ns)
        assert verdict.not_before_unix_ns <= last_ns
    else:
        assert isinstance(verdict, GiveUp)
        assert now + max(asked_ns, longest_ns) > last_ns


@pytest.mark.parametrize(
    ("value", "delay_s"),
    [
        ("120", 120),
        ("Tue, 14 Nov 2023 22:15:20 GMT", 120),  # START is 22:13:20
        ("Tue, 14 Nov 2023 20:00:00 GMT", 0),
        ("-5", 0),
        ("soon", 0),
        ("Tue, 14 Nov 99999999999 22:15:20 GMT", 0),
        ("9" * 5_000, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, delay_s: int) -> None:
    policy = RetryPolicy(first_delay_ms=0)
    answer = Answer(503, httpx.Headers({"retry-after": value}), b"")
    assert policy.judge(waiting(), answer, START, 0.0) == Retry(START + delay_s * NS, "HTTP 503")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_retry_after_is_read(value: str) -> None:
    answer = Answer(503, httpx.Headers([(b"retry-after", value.encode())]), b"")
    RetryPolicy().judge(waiting(), answer, START, 0.0)
