"""The HTTP API: no input makes it fail."""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from served import CLIENTS, Api


def _schema(api: Api) -> Any:
    document = api.call("GET", "/openapi.json").json()
    del document["paths"]["/events"]  # it does not end
    schema = schemathesis.openapi.from_dict(document)
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    return schema


def _operations() -> list[str]:
    """Names of all operations, which are the same for every control plane."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder, Api(Path(folder)) as api:
        paths = api.call("GET", "/openapi.json").json()["paths"]
    return [
        f"{method.upper()} {path}"
        for path, operations in paths.items()
        for method in operations
        if path != "/events"
    ]


@pytest.mark.parametrize("operation", _operations())
@pytest.mark.parametrize("by", ["operator", CLIENTS[0], "ue1"])
def test_no_request_that_the_document_allows_or_forbids_makes_it_fail(
    tmp_path: Path, operation: str, by: str
) -> None:
    method, _, path = operation.partition(" ")
    with Api(tmp_path) as api:
        found = _schema(api)[path][method]

        @settings(
            max_examples=8,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=found.as_strategy())
        def fuzz(case: Any) -> None:
            kwargs = case.as_transport_kwargs(base_url="http://core")
            headers = {k: v for k, v in kwargs["headers"].items() if k.lower() != "authorization"}
            try:
                answer = api.call(
                    kwargs["method"],
                    kwargs["url"],
                    kwargs.get("json"),
                    by=by,
                    headers=headers,
                    params=kwargs.get("params"),
                    content=kwargs.get("data") if isinstance(kwargs.get("data"), bytes) else None,
                )
            except (ValueError, TypeError, UnicodeError):  # the client cannot send such a thing
                return
            assert answer.status_code < 500 or answer.json()["cause"] in EXPECTED_503, answer.text

        fuzz()


# Said when nothing is wrong with the request or the system: there is no room.
EXPECTED_503 = {"NO_CANDIDATE", "NO_BANDWIDTH", "ANCHOR_NOT_READY"}

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3)
    ),
    max_leaves=6,
)


def test_no_intent_makes_it_fail(tmp_path: Path) -> None:
    names = ["task", "regions", "minTrustTier", "maxLatencyMs", "description", "requiredRates"]

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(name=st.sampled_from(names), value=ANYTHING)
    def fuzz(name: str, value: Any) -> None:
        intent = {"task": "text-generation", "durationMs": 60, name: value}
        answer = api.call("POST", "/sessions", {"intent": intent}, by="ue1")
        assert answer.status_code < 500 or answer.json()["cause"] in EXPECTED_503

    with Api(tmp_path) as api:
        fuzz()
