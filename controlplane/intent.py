"""The intent: what a UE asks for. It names no server, no model instance and no place."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

PIPELINE_TAG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")  # Hugging Face `pipeline_tag`
MIN_DURATION_MS, MAX_DURATION_MS = 50, 86_400_000

Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[\w.:-]+$")]
PipelineTag = Annotated[str, StringConstraints(max_length=64, pattern=rf"^{PIPELINE_TAG.pattern}$")]


class Intent(BaseModel):
    """Hard constraints, and how long. JSON members in camelCase; unknown ones are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=to_camel,
        validate_by_name=False,
        validate_by_alias=True,
        allow_inf_nan=False,
    )

    task: PipelineTag
    regions: Annotated[list[Name], Field(max_length=64)] = []  # allowed; empty: any
    min_trust_tier: Annotated[int, Field(ge=0, le=10)] = 0
    max_latency_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = None
    max_cost: Annotated[float, Field(ge=0, le=1e9)] | None = None
    qos_profile: Name = "QOS_E"
    duration_ms: Annotated[int, Field(ge=MIN_DURATION_MS, le=MAX_DURATION_MS)] = 60_000
