"""docs/serving.md: its files are what the daemon reads, its commands those that exist."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import TypeAdapter

from controlplane.catalogue import Catalogue
from controlplane.configfile import parse_yaml
from controlplane.policy import Tenants
from scripts import cli, client_secret
from scripts.errors import UserError
from scripts.serve import ServeConfig
from topologies.endpoints.anchor_server import Service

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def block(first_line: str) -> str:
    """Return the fenced block that begins with this line."""
    found = re.search(rf"^```\w+\n({re.escape(first_line)}\n.*?)^```$", DOCUMENT, re.M | re.S)
    assert found, first_line
    return found[1]


def test_files_fit_together() -> None:
    config = parse_yaml(block("# /etc/aipaging/router.yaml"), ServeConfig, "router.yaml")
    catalogue = parse_yaml(block("# /etc/aipaging/catalogue.yaml"), Catalogue, "catalogue.yaml")
    tenants = parse_yaml(block("# /etc/aipaging/tenants.yaml"), Tenants, "tenants.yaml")
    assert {anchor.name for anchor in catalogue.anchors} == {a.name for a in config.anchors}
    assert {s.tenant for s in config.subscribers} <= tenants.by_name().keys()
    config.gate(catalogue)
    described = re.search(r"`services.json` being `(\{.*?\}\})`", DOCUMENT, re.S)
    assert described
    services = TypeAdapter(dict[str, Service]).validate_json(described[1])
    for aisi, service in services.items():
        known = catalogue.service(aisi)
        assert (service.task, service.model, service.port) == (known.task, known.model, known.port)
        assert service.addresses == {known.address4, known.address6}


@pytest.mark.parametrize(
    ("aisi", "task"), [("no.such", "text-generation"), ("chat.example", "translation")]
)
def test_a_subscription_is_for_a_service_that_there_is(aisi: str, task: str) -> None:
    text, there = block("# /etc/aipaging/router.yaml"), '"fd00:45::1", cell: gnb1'
    assert there in text
    given = f"subscriptions: [{{aisi: {aisi}, intent: {{task: {task}}}}}]"
    config = parse_yaml(text.replace(there, f"{there}, {given}"), ServeConfig, "router.yaml")
    catalogue = parse_yaml(block("# /etc/aipaging/catalogue.yaml"), Catalogue, "catalogue.yaml")
    with pytest.raises(UserError, match=f"ue1: the catalogue has no service {aisi} that does"):
        config.subscribed(catalogue)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"aipaging ([a-z-]+)", DOCUMENT))))
def test_commands_exist(name: str) -> None:
    assert name in cli.COMMANDS


def test_a_client_secret_goes_with_its_hash() -> None:
    """The hash is for the tenants file; the secret is nowhere else."""
    made = CliRunner().invoke(client_secret.command, ["--json"])
    secret, secret_hash = json.loads(made.output).values()
    text = re.sub(r"sha256\$[\w$-]+", lambda _: secret_hash, block("# /etc/aipaging/tenants.yaml"))
    clients = parse_yaml(text, Tenants, "tenants.yaml").clients()
    assert "sessions:write" in clients.allowed("clinic-app", secret)
    assert secret not in text
    shown = CliRunner().invoke(client_secret.command, []).output
    assert re.fullmatch(r"secret: +\S{43}\nsecretHash: sha256\$\S+\n", shown)
