"""Which networks run in the background: one file each in /run/aipaging.

A registration names its process by pid and start time, so a pid that was given to another process
since is recognised.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from topologies import linux
from topologies.delay_measurement import describe
from topologies.hosts import Anchor, Core, Host, Ue

REGISTRY = Path("/run/aipaging")


class LifecycleError(Exception):
    """A background network could not be started, found or stopped."""


class HostSummary(BaseModel):
    """One host of a running network."""

    name: str
    pid: int  # in the run's own PID namespace
    address4: str | None
    address6: str | None

    @classmethod
    def of(cls, host: Host) -> "HostSummary":
        """Summarise a host; gNBs and the UPF have addresses on their links only."""
        own = host if isinstance(host, Ue | Anchor | Core) else None
        return cls(
            name=host.name,
            pid=host.pid,
            address4=str(own.address4) if own else None,
            address6=str(own.address6) if own else None,
        )


class Registration(BaseModel):
    """What is known of a background network."""

    run_id: str
    topology: str
    pid: int  # of the outer process, which owns the run
    start_ticks: int
    init_pid: int  # of PID 1 of the run, as seen from outside
    hosts: list[HostSummary]
    delays: dict[str, Any]

    def alive(self) -> bool:
        """Whether the registered process, and no other with its pid, still runs."""
        return linux.process_start_ticks(self.pid) == self.start_ticks

    def describe(self) -> list[str]:
        """What was built, a line per host and delayed link."""
        lines = [f"network {self.topology} is up (run {self.run_id})"]
        for host in self.hosts:
            addresses = " ".join(a for a in (host.address4, host.address6) if a)
            lines.append(f"  {host.name:<12} {addresses}".rstrip())
        return lines + [f"  {line}" for line in describe(self.delays)]


def sweep(registry: Path = REGISTRY) -> list[Registration]:
    """Remove registrations whose process is gone; return those that live."""
    live = []
    for path in sorted(registry.glob("*.json")):
        try:
            registration = Registration.model_validate_json(path.read_text())
        except (ValidationError, FileNotFoundError):
            path.unlink(missing_ok=True)  # written by another version: no run of ours
            continue
        if registration.alive():
            live.append(registration)
        else:
            path.unlink(missing_ok=True)
    return live
