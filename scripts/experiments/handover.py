"""The handover experiment: a UE moves to another gNB, and its anchor follows it.

As in the relocation experiment, but each episode begins with a handover: the UE's radio, then its
paths (downlink at the UPF, uplink at the UE) and a mobility report, then the relocation. Arms:
`none` (the noise floor), `mbb` (both radio links are up), `bbm` (the old radio link is lost for
`gap_ms` before the new one is there: the negative control, which must lose what was sent then).
"""

import time
from dataclasses import dataclass
from typing import Any

from scripts.errors import EXIT_BAD_INPUT, UserError
from scripts.experiments import common, relocation


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(relocation.Options):
    """Options of this experiment, beside those of a relocation."""

    gnbs: tuple[str, str]
    gap_ms: float  # without any radio link, in arm bbm


def run(options: Options) -> None:
    """Run the experiment and leave raw records and manifest in `options.out`."""
    scenario = relocation.resolve(options)
    there = [gnb.name for gnb in scenario.spec.gnbs]
    for name in options.gnbs:
        if name not in there:
            have = ", ".join(there)
            raise UserError(f"--gnbs: there is no gNB {name}; there are {have}", EXIT_BAD_INPUT)
    common.run(
        options,
        scenario,
        lambda testbed: _Handovers(options, scenario, testbed).run(),
        break_allowed=False,
    )


class _Handovers(relocation.Relocations):
    name = "handover"
    _options: Options

    def _move(self, arm: str, ue: str, target: str) -> dict[str, Any]:
        network = self._testbed.network
        source = next(each.serving_gnb for each in network.ues if each.name == ue)
        gnb = next(name for name in self._options.gnbs if name != source)
        handover_ns = time.time_ns()
        if arm == "bbm":
            network.set_radio(ue, source, up=False)
            time.sleep(self._options.gap_ms / 1000)
        network.handover(ue, gnb)
        path_switched_ns = time.time_ns()
        if arm == "bbm":
            network.set_radio(ue, source, up=True)
        self._testbed.request("POST", "/mobility-reports", {"ue": ue, "gnb": gnb})
        return {
            **self._relocate(ue, target, break_before_make=False),
            "gnb": gnb,
            "handover_ns": handover_ns,
            "path_switched_ns": path_switched_ns,
        }
