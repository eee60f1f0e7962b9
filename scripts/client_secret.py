"""`aipaging client-secret`: a secret for an OAuth client of the API."""

import json

import click

from controlplane.access_tokens import generate_secret


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print both as JSON.")
def command(as_json: bool) -> None:
    """Make a client secret, and the hash of it that the tenants file holds.

    The secret is shown once and kept nowhere: hand it to the client. docs/serving.md shows the
    rest.
    """
    secret, secret_hash = generate_secret()
    if as_json:
        click.echo(json.dumps({"secret": secret, "secretHash": secret_hash}))
        return
    click.echo(f"secret:     {secret}")
    click.echo(f"secretHash: {secret_hash}")
