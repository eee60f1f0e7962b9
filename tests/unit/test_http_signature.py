"""Signatures of requests: bit for bit those of a library that knows all of RFC 9421."""

from datetime import UTC, datetime

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    InvalidSignature,
    MappingKeyResolver,
    algorithms,
)

from controlplane import http_signature

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KID = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
NOW = 1_700_000_000
BODY = '{"größe":1}'.encode()


class Key:
    kid = KID

    def sign_bytes(self, data: bytes) -> bytes:
        return PRIVATE.sign(data)


def request(uri: str, body: bytes = BODY) -> httpx.Request:
    headers = {"content-type": "application/cloudevents+json", "authorization": "Bearer t"}
    return httpx.Request("POST", uri, content=body, headers=headers)


@pytest.mark.parametrize(
    "uri",
    [
        "https://host.example",
        "https://host.example:443/a/b?c=d&e=%20",
        "http://[fd00::1]:8080/?",
        "https://HOST.example:8443/A",
    ],
)
def test_it_is_what_the_library_makes(uri: str) -> None:
    ours, theirs = request(uri), request(uri)
    http_signature.sign(ours, Key(), NOW)
    keys = MappingKeyResolver(public_keys={}, private_keys={KID: PRIVATE})
    HTTPMessageSigner(signature_algorithm=algorithms.ED25519, key_resolver=keys).sign(
        theirs,
        key_id=KID,
        label=http_signature.LABEL,
        created=datetime.fromtimestamp(NOW, UTC),
        covered_component_ids=("@method", "@target-uri", "content-type", "content-digest"),
        body=BODY,
    )
    assert ours.headers == theirs.headers


@pytest.mark.parametrize("changed", ["method", "uri", "body", "content-type", "created", "key"])
def test_nothing_that_is_covered_can_be_changed(changed: str) -> None:
    sent = request("https://host.example/a")
    http_signature.sign(sent, Key(), int(datetime.now(UTC).timestamp()))
    method, uri, body, headers = sent.method, str(sent.url), BODY, sent.headers.copy()
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public = (other if changed == "key" else PRIVATE).public_key()
    verifier = HTTPMessageVerifier(
        signature_algorithm=algorithms.ED25519,
        key_resolver=MappingKeyResolver(public_keys={KID: public}, private_keys={}),
    )
    if changed != "key":
        verifier.verify(httpx.Request(method, uri, headers=headers), body=body)
    match changed:
        case "method":
            method = "PUT"
        case "uri":
            uri += "b"
        case "body":
            body += b" "
        case "content-type":
            headers["content-type"] = "text/plain"
        case "created":
            headers["signature-input"] = headers["signature-input"].replace("d=1", "d=2", 1)
    with pytest.raises(InvalidSignature):
        verifier.verify(httpx.Request(method, uri, headers=headers), body=body)
