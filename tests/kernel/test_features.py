"""The feature probe finds what is there and leaves nothing behind."""

import asyncio
import dataclasses
import json
import os
import subprocess

import pytest

from upf.features import Features, probe

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: new network namespaces"),
]


@pytest.fixture(scope="module")
def features() -> Features:
    return probe()


OURS = (" veth0", " bridge0", " htb0", " netem0", "0xa1", " probe")  # names that the probes use


def traces() -> list[str]:
    """Return what looks like a probe's, in the namespace that the tests run in."""
    commands = ("ip -o link", "ip rule", "ip -6 rule", "ip route show table 161", "nft list tables")
    outputs = [
        subprocess.run(command.split(), capture_output=True, text=True, check=False).stdout
        for command in commands
    ]
    lines = "".join(outputs).splitlines()
    return [line for line in lines if any(name in line for name in OURS)]


def test_finds_what_the_gate_needs(features: Features) -> None:
    assert features.netns
    assert features.timeout_map, features.reasons
    assert features.policy_routing and features.policy_routing6, features.reasons


def test_every_absence_has_a_reason(features: Features) -> None:
    names = {field.name for field in dataclasses.fields(Features)} - {"kernel", "reasons"}
    absent = {name for name in names if not getattr(features, name)}
    assert absent == set(features.reasons)


def test_agrees_with_the_kernel_version(features: Features) -> None:
    major, minor = (int(part) for part in features.kernel.split("-")[0].split(".")[:2])
    assert features.in_place_renewal == ((major, minor) >= (6, 12))


def test_is_json(features: Features) -> None:
    assert Features(**json.loads(json.dumps(features.to_json()))) == features


def test_leaves_nothing() -> None:
    before = traces()
    probe()
    assert traces() == before


def test_inside_a_running_loop() -> None:
    async def main() -> Features:
        return probe()

    assert asyncio.run(main()).netns
