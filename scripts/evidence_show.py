"""`aipaging evidence show`: what an evidence log tells, for people."""

from collections import defaultdict
from pathlib import Path

import click

from controlplane.clock import rfc3339
from controlplane.codec import Record
from controlplane.enforcement import Usage
from controlplane.entries import UTC_CLOCK, Chain, Entry, EntryError
from controlplane.facts import Acknowledged, PolicySet, Started, UeMoved, UplinkHeld, UplinkResumed
from controlplane.fleet import (
    AnchorDeregistered,
    AnchorDraining,
    AnchorFailed,
    AnchorRecovered,
    AnchorRegistered,
)
from controlplane.lease import Committed, DrainStarted, Ended, Prepared, Renewed, Terms
from scripts.evidence_files import lines_of, open_log

LeaseEvent = Prepared | Committed | Renewed | DrainStarted | Ended


class Story:
    """Lines by session, and those about the network around them."""

    def __init__(self) -> None:
        self.sessions: defaultdict[str, list[str]] = defaultdict(list)
        self.network: list[str] = []
        self._terms: dict[str, Terms] = {}

    def add(self, entry: Entry) -> None:
        """Tell of an entry. Raises KeyError if it is about a lease that no entry began."""
        match entry.event:
            case Prepared(terms, _) as event:
                self._terms[terms.lease_id] = terms
                if terms.session_id not in self.sessions:
                    about = f"{terms.ue} with {terms.aisi}, of {terms.tenant}"
                    self.sessions[terms.session_id].append(f"session {terms.session_id}: {about}")
                self._tell(entry, terms.lease_id, _life(event))
            case Committed() | Renewed() | DrainStarted() | Ended() as event:
                self._tell(entry, event.lease_id, _life(event))
            case Acknowledged(lease_ids, acknowledged_ns):
                for lease_id in lease_ids:
                    self._tell(entry, lease_id, f"enforced since {_time(acknowledged_ns)}")
            case UplinkHeld(lease_id, until_ns):
                self._tell(entry, lease_id, f"uplink held until {_time(until_ns)} at the latest")
            case UplinkResumed(lease_id):
                self._tell(entry, lease_id, "what was held went on: no target got ready")
            case event:
                self.network.append(f"{_when(entry)}  {_fact(event)}")

    def text(self) -> str:
        """Return all of it."""
        parts = list(self.sessions.values())
        if self.network:
            parts.append(["network", *self.network])
        return "\n\n".join("\n".join(lines) for lines in parts) or "no entries"

    def _tell(self, entry: Entry, lease_id: str, what: str) -> None:
        terms = self._terms[lease_id]
        where = f"{terms.anchor or 'QoS alone'} @{terms.epoch}"
        self.sessions[terms.session_id].append(f"{_when(entry)}  {where}  {what}")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def show(file: Path) -> None:
    """Print what the evidence log FILE tells, session by session. It is not verified.

    Last comes what happened to the network: starts of controllers, anchors, policies, UEs' moves.
    """
    chain, story = Chain(UTC_CLOCK), Story()
    with open_log(file) as log:
        for number, raw in enumerate(lines_of(log)):
            line = raw.removesuffix(b"\n")
            try:
                story.add(chain.check(line))
            except EntryError as error:
                chain.skip(line, error.index)
                click.echo(f"entry {number}: {error}", err=True)
            except KeyError as error:
                click.echo(f"entry {number}: lease {error} is unknown", err=True)
    click.echo(story.text())


def _life(event: LeaseEvent) -> str:
    match event:
        case Prepared(terms, until_ns):
            return f"prepared for {terms.cause}, until {_time(until_ns)} at the latest"
        case Committed(_, until_ns):
            return f"granted until {_time(until_ns)}"
        case Renewed(_, until_ns):
            return f"renewed until {_time(until_ns)}"
        case DrainStarted(_, until_ns):
            return f"superseded, drains until {_time(until_ns)}"
        case Ended(_, reason, usage, _):
            return f"ended: {reason}{_carried(usage)}"


def _carried(usage: Usage | None) -> str:
    if usage is None:
        return ""
    return (
        f"; carried {usage.uplink_packets:,} packets ({usage.uplink_bytes:,} bytes) up, "
        f"{usage.downlink_packets:,} ({usage.downlink_bytes:,}) down"
    )


def _fact(event: Record) -> str:
    match event:
        case Started(instance):
            return f"controller {instance} took over"
        case UeMoved(ue, cell):
            return f"{ue} moved to {cell}"
        case PolicySet(tenant, policy):
            limits = policy.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            named = ", ".join(f"{name}={value}" for name, value in limits.items())
            return f"{tenant} has another policy: {named or 'no limits'}"
        case AnchorRegistered(anchor, provider):
            return f"{anchor.name} registered by {provider}: {anchor.slots} slots, {anchor.region}"
        case AnchorDraining(name):
            return f"{name} takes no new sessions"
        case AnchorDeregistered(name):
            return f"{name} was withdrawn"
        case AnchorFailed(name, why):
            return f"{name} failed: {why}"
        case AnchorRecovered(name):
            return f"{name} recovered"
    raise AssertionError(event)


def _when(entry: Entry) -> str:
    return f"  {entry.index:>6}  {rfc3339(entry.at_ns)[:-4]}Z"


def _time(unix_ns: int) -> str:
    return rfc3339(unix_ns)[11:-7]
