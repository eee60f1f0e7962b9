"""The topology file: what an emulated network consists of. See two-edge.yaml for an example."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from controlplane.configfile import ConfigError, ConfigModel, load_yaml
from topologies.addressing import MAX_ANCHORS, MAX_GNBS, MAX_UES

MAX_RATE_MBPS = 30_000
MAX_DELAY_MS = 1_000
INTERFACE_NAME_LENGTH = 15
BUILTIN = ("two-edge", "two-edge-far")
_RESERVED = re.compile(r"(ue\d+|upf|core|cell|lo|all|default|wire-.*)")


def _node_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError("a name has lower-case letters, digits and '-', and starts with a letter")
    if _RESERVED.fullmatch(name):
        raise ValueError("this name is taken by a part of every topology")
    return name


def _fits(prefix: str) -> AfterValidator:
    longest = INTERFACE_NAME_LENGTH - len(prefix)

    def check(name: str) -> str:
        if len(name) > longest:
            raise ValueError(
                f"too long: the interface {prefix}{name} may have {INTERFACE_NAME_LENGTH} "
                f"characters, so the name at most {longest}"
            )
        return name

    return AfterValidator(check)


RateMbps = Annotated[float, Field(ge=0.1, le=MAX_RATE_MBPS, allow_inf_nan=False)]
DelayMs = Annotated[float, Field(ge=0, le=MAX_DELAY_MS, allow_inf_nan=False)]
NodeName = Annotated[str, AfterValidator(_node_name)]


class UesSpec(ConfigModel):
    """The user equipment."""

    count: Annotated[int, Field(ge=1, le=MAX_UES)] = 2


class RadioSpec(ConfigModel):
    """The air between a gNB and each UE in its cell."""

    delay_ms: DelayMs = 0  # one way


class N3Spec(ConfigModel):
    """The backhaul between a gNB and the UPF."""

    rate_mbps: RateMbps | None = None  # each direction; none: as fast as the machine
    delay_ms: DelayMs = 0  # one way


class GnbSpec(ConfigModel):
    """A gNB with its cell, whose capacity all UEs in it share."""

    name: Annotated[NodeName, _fits("radio-")]
    downlink_mbps: RateMbps
    uplink_mbps: RateMbps
    radio: RadioSpec = RadioSpec()
    n3: N3Spec = N3Spec()


class AnchorSpec(ConfigModel):
    """An AI execution anchor (AEXF) and its N6 link to the UPF."""

    name: Annotated[NodeName, _fits("n6-")]
    rate_mbps: RateMbps | None = None  # each direction; none: as fast as the machine
    delay_ms: DelayMs = 0  # one way


class CoreSpec(ConfigModel):
    """The host of the control plane and its link to the UPF."""

    delay_ms: DelayMs = 0  # one way


class TopologySpec(ConfigModel):
    """A whole network: UEs, gNBs, one UPF, anchors, one core host."""

    name: Annotated[str, Field(min_length=1)]
    ues: UesSpec = UesSpec()
    gnbs: Annotated[tuple[GnbSpec, ...], Field(min_length=1, max_length=MAX_GNBS)]
    anchors: Annotated[tuple[AnchorSpec, ...], Field(min_length=1, max_length=MAX_ANCHORS)]
    core: CoreSpec = CoreSpec()

    @model_validator(mode="after")
    def _names_differ(self) -> "TopologySpec":
        seen: set[str] = set()
        for location, name in _names(self):
            if name in seen:
                what = PydanticCustomError("duplicate_name", "there are two nodes of this name")
                complaint = InitErrorDetails(type=what, loc=location, input=name)
                # Raised like this, the complaint keeps its place in the file.
                raise ValidationError.from_exception_data("topology", [complaint])
            seen.add(name)
        return self


def _names(spec: TopologySpec) -> Iterable[tuple[tuple[str | int, ...], str]]:
    for number, gnb in enumerate(spec.gnbs):
        yield ("gnbs", number, "name"), gnb.name
    for number, anchor in enumerate(spec.anchors):
        yield ("anchors", number, "name"), anchor.name


def resolve(name_or_path: str | Path) -> Path:
    """The file a user means: the name of a built-in topology, or a path. Raises ConfigError."""
    if str(name_or_path) in BUILTIN:
        return Path(__file__).parent / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise ConfigError(
        f"{name_or_path}: no such topology file, and none of the built-in ones: "
        + ", ".join(BUILTIN)
    )


def load_topology(name_or_path: str | Path) -> TopologySpec:
    """Read a topology. Raises ConfigError, with file and line of each complaint."""
    return load_yaml(resolve(name_or_path), TopologySpec)
