"""The intent: what a UE asks for. It names no server, no model instance and no place."""

import re
from functools import cached_property
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from controlplane.canonical import canonical
from controlplane.jsonmodel import JsonModel

PIPELINE_TAG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")  # Hugging Face `pipeline_tag`
MIN_DURATION_MS, MAX_DURATION_MS = 50, 86_400_000
MAX_BPS = 10**15  # of any rate; whole numbers up to 2^53 are exact in canonical JSON (RFC 8785)
MAX_DESCRIPTION_CHARS = 1000

Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[\w.:-]+$")]
PipelineTag = Annotated[str, StringConstraints(max_length=64, pattern=rf"^{PIPELINE_TAG.pattern}$")]
QosProfileName = Annotated[  # as in CAMARA
    str, StringConstraints(min_length=3, max_length=256, pattern=r"^[a-zA-Z0-9_.-]+$")
]
Rate = Annotated[int, Field(ge=1, le=MAX_BPS)]


class RequiredRates(JsonModel):
    """Rates to be guaranteed between UE and anchor (GFBR); at least one of them."""

    downlink_bps: Rate | None = None
    uplink_bps: Rate | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.downlink_bps is None and self.uplink_bps is None:
            raise ValueError("give downlinkBps, uplinkBps or both")
        return self


class Intent(JsonModel):
    """Hard constraints, how long, and in free text what to prefer among what satisfies them."""

    task: PipelineTag
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    # Allowed; empty: any.
    regions: list[Name] = Field(default_factory=list, max_length=64)
    on_premises: bool = False  # must not leave the operator's own premises
    min_trust_tier: Annotated[int, Field(ge=0, le=10)] = 0
    max_latency_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = None
    min_rate_rps: Annotated[float, Field(gt=0, le=1e9)] | None = None  # requests/s, sustained
    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    max_cost: Annotated[float, Field(ge=0, le=1e9)] | None = None
    qos_profile: QosProfileName | None = None  # neither this nor rates: the catalogue's default
    required_rates: RequiredRates | None = None
    duration_ms: Annotated[int, Field(ge=MIN_DURATION_MS, le=MAX_DURATION_MS)] = 60_000

    @model_validator(mode="after")
    def _one_way_to_ask_for_qos(self) -> Self:
        if self.qos_profile is not None and self.required_rates is not None:
            raise ValueError("give qosProfile or requiredRates, not both")
        return self

    @cached_property
    def canonical(self) -> bytes:
        """Its canonical JSON (RFC 8785), without members that are None."""
        return canonical(self.model_dump(mode="json", by_alias=True, exclude_none=True))


_MAX_SHARED = 4_096
_shared: dict[str, Intent] = {}


def shared(intent: Intent) -> Intent:
    """Return an equal intent, the same for all: live sessions have few different ones."""
    if len(_shared) >= _MAX_SHARED:
        _shared.clear()
    return _shared.setdefault(intent.model_dump_json(), intent)
